"""One attempt of a request: choose workers, submit, write it down.

The same for a first placement, which admission makes, and for those after a failure, which the
dispatcher makes. Never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.router.placement.placer import Placer
from services.router.placement.policy import Placement
from services.router.requests.attempt import Attempt
from services.router.requests.failure_book import FailureBook
from services.router.requests.flight import Flight
from services.router.requests.request_log import RequestRecorder


class Starter:
    """One per router."""

    def __init__(
        self,
        placer: Placer,
        *,
        failures: FailureBook,
        recorder: RequestRecorder,
        wall_clock: Callable[[], float],
    ) -> None:
        self._placer = placer
        self._failures = failures
        self._recorder = recorder
        self._wall_clock = wall_clock

    def choose(self, flight: Flight) -> Placement:
        """Where the rest of the request should run now. Raises NoWorker."""
        now_s = asyncio.get_running_loop().time()
        return self._placer.choose(flight, resting=self._failures.resting(now_s))

    def start(self, flight: Flight, placement: Placement) -> Attempt:
        """Submit. Raises WorkerLost when a worker has just gone."""
        attempt = self._placer.start(flight, placement)
        now_s = asyncio.get_running_loop().time()
        self._failures.placed(placement, now_s, is_first=not flight.record.failures)
        self._recorder.placed(flight.record, placement, self._wall_clock())
        flight.attempt = attempt
        return attempt
