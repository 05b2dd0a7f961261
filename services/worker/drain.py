"""Leaving in good order: take no new work, wait for requests and leases, then end the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from baton.core.clock import Clock
from baton.core.errors import Unavailable
from baton.core.logging import log_fields
from services.worker.engine_loop import EngineLoop
from services.worker.requests import Requests

logger = logging.getLogger(__name__)

POLL_S = 0.05
SETTLE_S = 2.0
"""After requests were ended: time for the engine to let go of them."""


class Drain:
    """Draining is for good: a worker that has begun it takes no work until it is restarted."""

    def __init__(
        self,
        *,
        engine: EngineLoop,
        requests: Requests,
        clock: Clock,
        has_mates: Callable[[], Awaitable[bool]],
    ) -> None:
        """`has_mates`: whether another worker of the pool takes work; takes seconds at most."""
        self._engine = engine
        self._has_mates = has_mates
        self._requests = requests
        self._clock = clock

    async def run(self, *, timeout_s: float, hands_back: bool = False) -> int:
        """Returns the number of requests that were ended because `timeout_s` passed; their routers
        place them anew. `hands_back`: those that have not begun go at once where others of the pool
        can take them."""
        self._requests.start_draining()
        num_live = self._requests.num_live
        log_fields(logger, f"draining {num_live} requests", requests=num_live, timeout_s=timeout_s)
        handing = asyncio.create_task(self._hand_back_waiting()) if hands_back else None
        try:
            if await self._is_empty_within(timeout_s):
                return 0
        finally:
            if handing is not None:
                handing.cancel()
                await asyncio.gather(handing, return_exceptions=True)
        num_ended = self._requests.end_all("the worker is shutting down")
        await self._is_empty_within(SETTLE_S)
        log_fields(logger, f"drain timed out, {num_ended} requests ended", ended=num_ended)
        return num_ended

    async def _hand_back_waiting(self) -> None:
        if not await self._has_mates():
            return
        while True:
            waiting = await self._engine.waiting_ids()
            self._requests.hand_back_waiting(waiting, "the worker is leaving")
            await asyncio.sleep(POLL_S)

    async def _is_empty_within(self, timeout_s: float) -> bool:
        deadline_s = self._clock.now() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._is_empty():
                    await asyncio.sleep(min(POLL_S, max(0.0, deadline_s - self._clock.now())))
        except TimeoutError:
            return False
        except Unavailable:
            # The engine has stopped: nothing is left to wait for.
            return True
        return True

    async def _is_empty(self) -> bool:
        if self._requests.num_live:
            return False
        return await self._engine.is_empty()
