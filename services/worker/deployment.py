"""A worker inside a Ray Serve replica: the same WorkerServer, with Serve's hooks around it.

Serve starts, health-checks and replaces replicas. Tokens never pass through it: routers find the
worker by the replica's metadata and open their own session to it. A replica that Serve takes
down leaves every router's view first and is then given time to drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.serve.config import RequestRouterConfig

from baton.core.errors import Unavailable
from baton.rpc.convert import worker_info_to_wire
from baton.settings import start_logging
from services.worker.config import load_worker_config
from services.worker.worker import WorkerServer

STOP_MARGIN_S = 10.0
FIXED_ROLE = (
    "Ray Serve runs this worker and counts it as a replica of its pool's deployment; change the "
    "number of replicas of both pools instead"
)
SERVE_OPTIONS: dict[str, Any] = {
    "request_router_config": RequestRouterConfig(
        request_router_class="services.router.workers.ray_membership.PublishingRequestRouter"
    ),
    # A fraction: the engine's threads are the machine's cores whatever Ray books for them.
    "ray_actor_options": {"num_cpus": 0.1},
    "health_check_period_s": 1.0,
    "health_check_timeout_s": 5.0,
    # Serve sees no requests here, so its own waiting loop only adds to every stop.
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 30.0,
}


class WorkerReplica:
    """One worker; the pools' deployments give it their defaults."""

    DEFAULTS: Mapping[str, Any]

    async def __init__(self, values: Mapping[str, Any], log_dir: str | None = None) -> None:  # type: ignore[misc]
        config = load_worker_config(defaults=self.DEFAULTS, overrides=values)
        name = config.worker_id or config.role.value
        start_logging(name, config.log, Path(log_dir) / f"{name}.log" if log_dir else None)
        self._drain_s = config.drain_s
        self._server = WorkerServer(config, fixed_role=FIXED_ROLE)
        await self._server.start()

    async def record_replica_metadata(self) -> dict[str, str]:
        """What routers get to know of this replica: its WorkerInfo, serialized."""
        return {"worker_info": worker_info_to_wire(self._server.info).SerializeToString().hex()}

    async def check_health(self) -> None:
        """Raises Unavailable; Serve replaces the replica after three failures."""
        verdict = await self._server.check_health()
        if not verdict.is_healthy:
            raise Unavailable(verdict.reason)

    async def __del__(self) -> None:
        async with asyncio.timeout(self._drain_s + STOP_MARGIN_S):
            await self._server.stop()
