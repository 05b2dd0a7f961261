"""The time of engine steps, divided among the sequences in them.

    launch 0      launch 1            launch 2
       │─────────────│──step 0 over──────│──step 1 over──
       │◄──── step 0's time ────►│◄──── step 1's ────►│

A step's time runs from its launch, or from the end of the step before it if that is later, to its
end: steps in flight together do not count twice, and a runner that waits for work does not count at
all. It is divided by the tokens that the step computed of each sequence.

Not known here: batches, runners.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from baton.core.clock import Clock
from baton.engine.sequence import Sequence


class StepShares:
    def __init__(self, clock: Clock, *, num_ranks: int = 1) -> None:
        """`clock` never goes back. `num_ranks`: processes that compute each step."""
        self._clock = clock
        self._num_ranks = num_ranks
        self._started_at_s: deque[float] = deque()
        """Of the steps in flight, oldest first."""
        self._ended_at_s = -math.inf
        self.busy_s = 0.0
        """Of all steps, on each rank."""
        self.num_steps = 0

    def now(self) -> float:
        return self._clock.now()

    def launched(self, started_at_s: float) -> None:
        """A step whose launch began at `started_at_s` is in flight."""
        self._started_at_s.append(started_at_s)

    def over(self, parts: Iterable[tuple[Sequence, int]]) -> None:
        """The oldest step has ended; `parts`: its sequences that still run, and their tokens."""
        now_s = self._clock.now()
        step_s = now_s - max(self._started_at_s.popleft(), self._ended_at_s)
        self._ended_at_s = now_s
        self.busy_s += step_s
        self.num_steps += 1
        living = list(parts)
        num_tokens = sum(n for _, n in living)
        if not num_tokens:
            return
        token_s = step_s * self._num_ranks / num_tokens
        for sequence, n in living:
            use = sequence.timeline.engine
            use.seconds += token_s * n
            use.num_steps += 1

    def aborted(self) -> None:
        """Nothing is in flight any more."""
        self._started_at_s.clear()
