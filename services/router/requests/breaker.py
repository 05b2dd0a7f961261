"""Workers that answer but fail what they are given get no new requests for a while.

    CLOSED ── enough failures in the window ──► OPEN ── pause over ──► HALF_OPEN: one trial request
       ▲                                         ▲                          │
       │                                         └──── it fails: longer ────┤
       └──────────────────────────── it succeeds ───────────────────────────┘

A lost worker is not this file's business: it takes no requests until its session is back, with an
empty past. Nor is one that is full. Pure: time is passed in.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from baton.core.worker_info import WorkerId
from services.router.requests.retry_config import BreakerConfig

MAX_OUTCOMES = 256
"""Remembered per worker; the oldest is forgotten first."""


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class _Breaker:
    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=MAX_OUTCOMES))
    """(when, whether it failed), oldest first."""
    state: BreakerState = BreakerState.CLOSED
    until_s: float = 0.0
    pause_s: float = 0.0


class Breakers:
    """One per worker that has failed a request."""

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._breakers: dict[WorkerId, _Breaker] = {}
        self._shut: set[WorkerId] = set()
        """Not CLOSED: the few that `resting` has to look at."""

    def __len__(self) -> int:
        return len(self._breakers)

    def state(self, worker_id: WorkerId) -> BreakerState:
        breaker = self._breakers.get(worker_id)
        return BreakerState.CLOSED if breaker is None else breaker.state

    def shut(self) -> frozenset[WorkerId]:
        """Workers whose breaker is open or on trial."""
        return frozenset(self._shut)

    def resting(self, now_s: float) -> frozenset[WorkerId]:
        """Workers to leave alone now: open ones, and those whose trial runs."""
        if not self._shut:
            return frozenset()
        return frozenset(w for w in self._shut if now_s < self._breakers[w].until_s)

    def placed(self, worker_id: WorkerId, now_s: float) -> None:
        """A request goes to the worker; after the pause it is the trial."""
        breaker = self._breakers.get(worker_id)
        if breaker is None or breaker.state is BreakerState.CLOSED or now_s < breaker.until_s:
            return
        breaker.state = BreakerState.HALF_OPEN
        # A trial whose end nobody reports, a cancelled one, must not rest the worker for good.
        breaker.until_s = now_s + breaker.pause_s

    def succeeded(self, worker_id: WorkerId, now_s: float) -> None:
        """The worker has done its part of a request."""
        breaker = self._breakers.get(worker_id)
        if breaker is None:
            return
        if breaker.state is BreakerState.CLOSED:
            breaker.outcomes.append((now_s, False))
            return
        if breaker.state is BreakerState.HALF_OPEN:
            self.forget(worker_id)

    def failed(self, worker_id: WorkerId, now_s: float) -> None:
        """The worker, alive and not full, has failed a request."""
        breaker = self._breakers.setdefault(worker_id, _Breaker())
        if breaker.state is BreakerState.HALF_OPEN:
            self._open(worker_id, breaker, min(2 * breaker.pause_s, self._config.open_max_s), now_s)
        elif breaker.state is BreakerState.CLOSED:
            breaker.outcomes.append((now_s, True))
            if self._has_failed_enough(breaker, now_s):
                self._open(worker_id, breaker, self._config.open_s, now_s)

    def forget(self, worker_id: WorkerId) -> None:
        """The worker has left, or starts anew."""
        self._breakers.pop(worker_id, None)
        self._shut.discard(worker_id)

    def _has_failed_enough(self, breaker: _Breaker, now_s: float) -> bool:
        outcomes = breaker.outcomes
        while outcomes and outcomes[0][0] < now_s - self._config.window_s:
            outcomes.popleft()
        num_failed = sum(is_failed for _, is_failed in outcomes)
        return (
            num_failed >= self._config.min_failures
            and num_failed >= self._config.failure_ratio * len(outcomes)
        )

    def _open(self, worker_id: WorkerId, breaker: _Breaker, pause_s: float, now_s: float) -> None:
        breaker.state = BreakerState.OPEN
        breaker.pause_s, breaker.until_s = pause_s, now_s + pause_s
        breaker.outcomes.clear()
        self._shut.add(worker_id)
