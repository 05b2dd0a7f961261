"""Steps that are launched and not over yet, oldest first.

    launch step 0
    launch step 1    wait for step 0    the runner never idles while the host postprocesses
    launch step 2    wait for step 1    and schedules

1. `launch` starts a step; its sequences' tokens count as computed from then on, and the ones it
   samples as pending: the next schedule builds on a step whose outcome nobody knows
2. `wait` returns the oldest step's outcome; what it computed is settled
3. `abort`, after either has raised, waits for all that is left and drops its results

Not known here: blocks, what a token means for its sequence.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from baton.core.errors import InternalError
from baton.engine.batch import Batch, LaunchedStep, Runner, SampledToken
from baton.engine.sequence import Sequence

logger = logging.getLogger(__name__)

LARGEST_NUM_IN_FLIGHT = 2
"""A batch holds at most one token of a sequence whose value is not known."""


class LaunchedSequence(NamedTuple):
    """A scheduled sequence, and whether this step samples for it."""

    sequence: Sequence
    num_new_tokens: int
    samples: bool


@dataclass(slots=True)
class _Step:
    launched: LaunchedStep
    sequences: list[LaunchedSequence]
    is_over: bool = False


class StepsInFlight:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._max_in_flight = runner.max_in_flight
        if not 1 <= self._max_in_flight <= LARGEST_NUM_IN_FLIGHT:
            raise InternalError(
                f"the runner wants {self._max_in_flight} steps in flight, the engine keeps 1 to "
                f"{LARGEST_NUM_IN_FLIGHT}"
            )
        self._steps: deque[_Step] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        return len(self._steps) >= self._max_in_flight

    def launch(self, batch: Batch) -> None:
        """Start a step. Raises what the runner raises; nothing has been counted then."""
        sequences = [LaunchedSequence(*s, s.samples) for s in batch.scheduled]
        launched = self._runner.launch(batch)
        for sequence, num_new_tokens, samples in sequences:
            sequence.num_computed_tokens += num_new_tokens
            sequence.num_in_flight_tokens += num_new_tokens
            sequence.num_pending_tokens += samples
        self._steps.append(_Step(launched, sequences))

    def wait(self) -> list[tuple[LaunchedSequence, SampledToken | None]]:
        """The outcome of the oldest step, in the order of its batch.

        Raises what the step raised, or InternalError for a wrong answer; `abort` must follow.
        """
        step = self._steps[0]
        # Whatever it raises, the step is over.
        step.is_over = True
        results = step.launched.wait()
        if len(results) != len(step.sequences):
            raise InternalError(f"{len(results)} results for {len(step.sequences)} sequences")
        outcomes = list(zip(step.sequences, results, strict=True))
        for launched, result in outcomes:
            if launched.samples and result is None:
                raise InternalError(f"no token for request {launched.sequence.request_id}")
        self._steps.popleft()
        _settle(step)
        return outcomes

    def abort(self) -> list[Sequence]:
        """Wait until nothing is in flight, drop all results; whose they were, each once."""
        sequences: dict[Sequence, None] = {}
        while self._steps:
            step = self._steps.popleft()
            if not step.is_over:
                try:
                    step.launched.wait()
                except Exception as error:
                    logger.warning("a step behind a failed one failed too: %s", error)
            _settle(step)
            sequences.update((launched.sequence, None) for launched in step.sequences)
        return list(sequences)

    def check_integrity(self, known: Iterable[Sequence]) -> None:
        """Raises InternalError unless the `known` sequences count exactly what is in flight."""
        in_flight: Counter[Sequence] = Counter()
        pending: Counter[Sequence] = Counter()
        for step in self._steps:
            for sequence, num_new_tokens, samples in step.sequences:
                in_flight[sequence] += num_new_tokens
                pending[sequence] += samples
        for sequence in known:
            found = (in_flight.pop(sequence, 0), pending[sequence])
            counted = (sequence.num_in_flight_tokens, sequence.num_pending_tokens)
            if found != counted:
                raise InternalError(
                    f"sequence {sequence.request_id} counts {counted} tokens in flight and "
                    f"pending; the steps in flight hold {found}"
                )
        if in_flight:
            names = [sequence.request_id for sequence in in_flight]
            raise InternalError(f"steps in flight compute for sequences that are gone: {names}")


def _settle(step: _Step) -> None:
    for sequence, num_new_tokens, samples in step.sequences:
        sequence.num_in_flight_tokens -= num_new_tokens
        sequence.num_pending_tokens -= samples
