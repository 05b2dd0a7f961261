"""What happens when, in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class EventQueue:
    """Also the clock of everything simulated. Equal times happen in the order they were added."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._now_s = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def now(self) -> float:
        """Seconds since the start."""
        return self._now_s

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Let `event` happen at `time_s`, or now if that has passed."""
        heapq.heappush(self._heap, (max(time_s, self._now_s), next(self._numbers), event))

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        self.at(self._now_s + delay_s, event)

    def step(self) -> bool:
        """The next event; False when there is none."""
        if not self._heap:
            return False
        self._now_s, _, event = heapq.heappop(self._heap)
        event()
        return True
