"""What the scheduler hands to the model runner and what it gets back. Torch-free values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.core.block import BlockId
from baton.core.request import RequestId, TokenLogprobs
from baton.engine.sequence import Sequence

PENDING_TOKEN_ID = 0
"""Stands where a token's value is not known yet; valid in every vocabulary."""


class ScheduledSequence(NamedTuple):
    """`num_new_tokens` tokens of `sequence` to compute, from `sequence.num_computed_tokens` on."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """True when the step computes the last token, so the next one can be sampled.

        Holds until the step is launched.
        """
        s = self.sequence
        return s.num_computed_tokens + self.num_new_tokens == s.num_tokens


@dataclass(frozen=True, slots=True)
class LayerMarks:
    """Somebody wants to know how far a step is while it runs."""

    layers: tuple[int, ...]
    """Rising numbers of layers, none of them beyond the model's."""
    reached: Callable[[int], None]
    """Called with each of `layers` once the KV of so many is in memory on every rank: on any
    thread, in order, perhaps not at all. Must not block or raise."""

    def pass_layers(self, num_layers: int) -> None:
        """So many are in memory now."""
        if num_layers in self.layers:
            self.reached(num_layers)


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step. Every sequence has blocks for all tokens it computes in this step."""

    scheduled: tuple[ScheduledSequence, ...]
    layer_marks: LayerMarks | None = None
    """Only of a step that samples."""

    @property
    def num_tokens(self) -> int:
        return sum(s.num_new_tokens for s in self.scheduled)


class SequenceSlice(NamedTuple):
    """What a process that only computes must know of one scheduled sequence; picklable.

    A pending token is the one that the launch before sampled for the same sequence.
    """

    request_id: RequestId
    first_position: int
    """Position of the first new token in the sequence."""
    token_ids: tuple[int, ...]
    """The new tokens. With `has_pending_token` the last one is a placeholder."""
    has_pending_token: bool
    """The last new token was sampled in the step before and its value is not on the host yet."""
    block_table: tuple[BlockId, ...]
    """Blocks of all tokens up to the last new one."""
    samples: bool
    num_scored: int = 0
    """Leading new tokens that are followed by prompt tokens whose log-probabilities are wanted."""

    @classmethod
    def of(cls, scheduled: ScheduledSequence, block_size: int) -> SequenceSlice:
        """Before the step is launched, as `Runner.launch` sees the sequence."""
        sequence, num_new_tokens = scheduled
        first = sequence.num_computed_tokens
        end = first + num_new_tokens
        token_ids = tuple(sequence.token_ids[first:end])
        has_pending_token = len(token_ids) < num_new_tokens
        if has_pending_token:
            token_ids += (PENDING_TOKEN_ID,)
        return cls(
            request_id=sequence.request_id,
            first_position=first,
            token_ids=token_ids,
            has_pending_token=has_pending_token,
            block_table=tuple(sequence.block_table[: -(-end // block_size)]),
            samples=scheduled.samples,
            num_scored=_num_scored(sequence, first, end),
        )


class ScoredSpan(NamedTuple):
    """Rows of a step's plan that are scored, of one slice."""

    slice_index: int
    first_row: int
    num_rows: int


def _num_scored(sequence: Sequence, first: int, end: int) -> int:
    """Of the tokens from `first` to `end`, those that a prompt token follows."""
    if not sequence.wants_prompt_logprobs:
        return 0
    return max(0, min(end, sequence.num_prompt_tokens - 1) - first)


def slices(batch: Batch, block_size: int) -> tuple[SequenceSlice, ...]:
    """The batch for a process that only computes, in the same order."""
    return tuple(SequenceSlice.of(scheduled, block_size) for scheduled in batch.scheduled)


NO_TOKEN_ID = -1


class SampledToken(NamedTuple):
    """The outcome for one sequence of the batch with `samples` true, or with scored tokens."""

    token_id: int
    """NO_TOKEN_ID when only prompt tokens were scored."""
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token that is followed by a prompt token: of that one."""
    error: str = ""
    """Why the sequence must end without the token."""


class LaunchedStep(Protocol):
    """A step on its way."""

    def wait(self) -> list[SampledToken | None]:
        """One entry per scheduled sequence, None where the sequence does not sample yet.

        Called once, in the order of launches. Raises what the computation raised. Either way
        the step is over on every rank: its KV is in memory for any reader, and nothing writes.
        """
        ...


class Runner(Protocol):
    """Computes batches: writes the KV of all their tokens, samples where due."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be launched before the first of them is waited for: 1 or 2."""
        ...

    def launch(self, batch: Batch) -> LaunchedStep:
        """Start a step. Reads the sequences now; they may change once this returns.

        Steps run in the order of launches, each seeing all KV written by those before it, and
        the tokens that the one before sampled (`SequenceSlice.has_pending_token`). Two batches
        in a row may have no sequence in common, and a request id that has ended may come back
        for another sequence in the very next one.
        """
        ...


class CompletedStep:
    """The step of a runner that computes while it launches."""

    __slots__ = ("_results",)

    def __init__(self, results: list[SampledToken | None]) -> None:
        self._results = results

    def wait(self) -> list[SampledToken | None]:
        return self._results
