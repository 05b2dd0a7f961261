"""Workers of one host that slow each other down: they share cores, caches and memory bandwidth.

    a step's pace   1 / (1 + neighbour_share * other steps under way at that moment)

A step that another one joins half-way has its second half slowed, and speeds up again when the
other one ends. Does not know: what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.simulator.events import EventQueue


@dataclass(slots=True, eq=False)
class _Step:
    left_s: float
    """Of a host of its own."""
    neighbour_share: float
    done: Callable[[], None]
    version: int = 0
    """Of its planned end; earlier plans are void."""


class Host:
    def __init__(self, events: EventQueue) -> None:
        self._events = events
        self._steps: list[_Step] = []
        self._settled_s = 0.0

    def run(self, seconds: float, neighbour_share: float, done: Callable[[], None]) -> None:
        """`done` is called when a step that takes `seconds` alone is over."""
        self._settle()
        self._steps.append(_Step(seconds, neighbour_share, done))
        self._plan()

    def _settle(self) -> None:
        """Count what has been done at the pace so far."""
        now_s = self._events.now()
        elapsed_s, self._settled_s = now_s - self._settled_s, now_s
        for step in self._steps:
            step.left_s -= elapsed_s / self._slowdown(step)

    def _plan(self) -> None:
        for step in self._steps:
            step.version += 1
            left_s = max(0.0, step.left_s) * self._slowdown(step)
            self._events.after(
                left_s,
                lambda step=step, version=step.version: self._end(step, version),  # type: ignore[misc]
            )

    def _end(self, step: _Step, version: int) -> None:
        if version != step.version:
            return
        self._settle()
        self._steps.remove(step)
        step.version += 1
        self._plan()
        step.done()

    def _slowdown(self, step: _Step) -> float:
        return 1.0 + step.neighbour_share * (len(self._steps) - 1)
