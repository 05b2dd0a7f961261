"""Is this worker able to serve? Judged by its engine thread, not by the process existing.

A computing engine must show a heartbeat (one per step); an idle one must answer a ping. The
verdict goes to grpc.health.v1, to the routers (with the load), and to `check`, which a supervisor
may call. A worker that stays unhealthy has `failed`: whoever runs it ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as grpc_health

from baton.core.errors import Unavailable
from services.worker.config import HealthConfig
from services.worker.engine_loop import EngineLoop

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthVerdict(NamedTuple):
    is_healthy: bool
    reason: str


class Health:
    """Watches one engine loop."""

    def __init__(
        self,
        engine: EngineLoop,
        config: HealthConfig,
        *,
        service_names: tuple[str, ...],
        on_verdict: Callable[[HealthVerdict], None] = lambda verdict: None,
    ) -> None:
        """`on_verdict` is told what `watch` finds."""
        self.servicer = grpc_health.HealthServicer()
        self.failed = asyncio.Event()
        """Set once too many bad verdicts came in a row, or by `give_up`."""
        self._engine = engine
        self._config = config
        self._on_verdict = on_verdict
        self._service_names = ("", *service_names)
        self._is_serving: bool | None = None
        self._is_leaving = False
        self._num_bad_verdicts = 0
        self._defect = ""

    @property
    def is_serving(self) -> bool:
        """What was last published."""
        return bool(self._is_serving)

    async def check(self) -> HealthVerdict:
        """Answers within the ping's bound."""
        engine, config = self._engine, self._config
        if self._defect:
            return HealthVerdict(False, self._defect)
        if not engine.is_alive:
            return HealthVerdict(False, "the engine thread has ended")
        if engine.is_broken:
            return HealthVerdict(False, "the engine failed several steps in a row")
        if engine.is_computing:
            age_s, limit_s = engine.seconds_since_beat, config.step_timeout_s
            if age_s > limit_s:
                message = f"no engine step ended within {age_s:.0f} s, limit {limit_s:g} s"
                return HealthVerdict(False, message)
            return HealthVerdict(True, "computing")
        try:
            async with asyncio.timeout(config.ping_timeout_s):
                await engine.ping()
        except TimeoutError:
            message = f"the idle engine did not answer within {config.ping_timeout_s:g} s"
            return HealthVerdict(False, message)
        except Unavailable as error:
            return HealthVerdict(False, str(error))
        return HealthVerdict(True, "idle and answering")

    async def watch(self) -> None:
        """Keep the gRPC health status up to date until cancelled."""
        while True:
            verdict = await self.check()
            if not verdict.is_healthy and self._is_serving is not False:
                logger.error("unhealthy: %s", verdict.reason)
            self._count(verdict)
            self._on_verdict(verdict)
            await self._set_serving(verdict.is_healthy and not self._is_leaving)
            await asyncio.sleep(self._config.period_s)

    def give_up(self, reason: str) -> None:
        """A part of the worker is lost for good."""
        logger.error("unhealthy for good: %s", reason)
        self._defect = self._defect or reason
        self._on_verdict(HealthVerdict(False, self._defect))
        self.failed.set()

    async def leave(self) -> None:
        """Not serving from now on, however healthy."""
        self._is_leaving = True
        await self._set_serving(False)

    def _count(self, verdict: HealthVerdict) -> None:
        self._num_bad_verdicts = 0 if verdict.is_healthy else self._num_bad_verdicts + 1
        limit = self._config.max_bad_verdicts
        if self._num_bad_verdicts == limit:
            logger.error("%d bad verdicts in a row, the last: %s", limit, verdict.reason)
            self.failed.set()

    async def _set_serving(self, is_serving: bool) -> None:
        """Publish a status for all services of this server."""
        if is_serving == self._is_serving:
            return
        self._is_serving = is_serving
        for name in self._service_names:
            await self.servicer.set(name, SERVING if is_serving else NOT_SERVING)
