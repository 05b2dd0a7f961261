"""Time as a value that is passed in, so that state machines run under virtual time in tests."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of seconds; which one is the choice of whoever builds the object that takes it."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock; on Linux all processes of one host share its origin."""

    def now(self) -> float:
        return time.monotonic()


class WallClock:
    """Seconds since 1970. For time points that are compared between hosts, never for waiting."""

    def now(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"a clock cannot go back: {seconds}")
        self._now_s += seconds
