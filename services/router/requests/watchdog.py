"""Looks for requests nobody works on, and for clients that do not take what is there for them.

A request that is moving between workers has a time limit of its own (`migrate`), and one whose
client has yet to read what arrived waits for no worker: it is given up when the client has taken
nothing for `slow_client_s`, since its tokens would fill the router and hold blocks of a worker.

Does not know: placement, retries, text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from services.router.config import DispatchConfig
from services.router.requests.attempt import Attempt
from services.router.requests.flight import Flight
from services.router.requests.mailbox import Arrival

LATE_S = 0.5
"""The watchdog came this much too late: the process itself stood still."""


class Watchdog:
    """Runs on the event loop of the requests."""

    def __init__(
        self,
        flights: Collection[Flight],
        config: DispatchConfig,
        *,
        give_up: Callable[[Flight, float], None],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`flights`: those alive now, changed by their owner. `give_up(flight, waited_s)` is called
        for one whose client does not read."""
        self._flights = flights
        self._config = config
        self._give_up = give_up
        self._wall_clock = wall_clock

    async def run(self) -> None:
        """Ends by cancellation only."""
        loop = asyncio.get_running_loop()
        while True:
            planned_at_s = loop.time() + self._config.watchdog_period_s
            await asyncio.sleep(self._config.watchdog_period_s)
            if loop.time() - planned_at_s > LATE_S:
                # What the workers sent meanwhile is not read yet.
                continue
            for flight in list(self._flights):
                if flight.attempt is not None:
                    self._check(flight.attempt, loop.time())
                    self._check_client(flight, flight.attempt, loop.time())

    def _check_client(self, flight: Flight, attempt: Attempt, now_s: float) -> None:
        waited_s = attempt.mailbox.unread_for_s(now_s)
        if waited_s > self._config.slow_client_s:
            self._give_up(flight, waited_s)

    def _check(self, attempt: Attempt, now_s: float) -> None:
        """Blames the worker whose turn it is. One that serves others is left alone much longer:
        the request may be in its queue, or preempted."""
        worker_id = attempt.waits_for
        quiet_s = now_s - attempt.mailbox.last_put_at_s
        if worker_id is None or quiet_s <= self._config.stall_s:
            return
        session = attempt.sessions[worker_id]
        if now_s - session.last_progress_at_s > self._config.stall_s:
            session.quarantine(f"no progress for {quiet_s:.0f} s with requests to work on")
        elif quiet_s > self._config.request_stall_s:
            lost = f"no token for {quiet_s:.0f} s"
            attempt.mailbox.put(Arrival(worker_id, self._wall_clock(), lost=lost), now_s)
