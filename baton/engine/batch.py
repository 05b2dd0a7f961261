"""What the scheduler hands to the model runner and what it gets back. Torch-free values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.core.request import TokenLogprobs
from baton.engine.sequence import Sequence


class ScheduledSequence(NamedTuple):
    """`num_new_tokens` tokens of `sequence` to compute, from `sequence.num_computed_tokens` on."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """True when the step computes the last known token, so the next one can be sampled."""
        s = self.sequence
        return s.num_computed_tokens + self.num_new_tokens == s.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step. Every sequence has blocks for all tokens it computes in this step."""

    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(s.num_new_tokens for s in self.scheduled)


class SampledToken(NamedTuple):
    """The outcome for one sequence of the batch with `samples` true."""

    token_id: int
    logprobs: TokenLogprobs | None


class Runner(Protocol):
    """Computes a batch: writes the KV of all its tokens, samples where due."""

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        """One entry per scheduled sequence, None where the sequence does not sample yet."""
        ...
