"""Whether a step is taking too long. Time and progress come from outside."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TICK_S = 0.5
"""Of the time between two looks, what counts."""


@dataclass(slots=True)
class StepCount:
    """Written by the thread that steps."""

    num_sent: int = 0
    num_ended: int = 0


class StepClock:
    """Asked several times a second by the thread that watches the ranks.

    Only time in which that thread was running counts: a worker that was stopped itself and goes
    on does not find its ranks overdue.
    """

    def __init__(self, limit_s: float, now_s: float) -> None:
        self._limit_s = limit_s
        self._looked_at_s = now_s
        self._num_ended_steps = 0
        self._waited_s = 0.0

    def is_overdue(self, now_s: float, steps: StepCount) -> bool:
        """True when steps are on their way and none has ended for longer than the limit."""
        passed_s = min(now_s - self._looked_at_s, MAX_TICK_S)
        self._looked_at_s = now_s
        num_ended = steps.num_ended
        if num_ended != self._num_ended_steps or num_ended >= steps.num_sent:
            self._num_ended_steps = num_ended
            self._waited_s = 0.0
        else:
            self._waited_s += passed_s
        return self._waited_s > self._limit_s
