"""What one call of `Engine.step` tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.core.block import BlockHash
from baton.core.request import RequestId, TokenDelta
from baton.engine.handoff import ChunkDone, Reservation


class BatchOutcome(Enum):
    NONE = "none"
    """No step came to its end in this call."""
    COMPUTED = "computed"
    FAILED = "failed"
    """The runner raised or answered wrongly; all that was in flight has ended with an error."""


@dataclass(slots=True)
class StepOutput:
    """Everything one step, and the calls since the step before, have to tell."""

    deltas: list[TokenDelta] = field(default_factory=list)
    chunks: list[ChunkDone] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    handovers_ended: list[RequestId] = field(default_factory=list)
    """Handovers that nobody outside ended: the sequence was preempted, or came to its own end
    (then its last delta is here too). What was announced stays leased."""
    stored: list[BlockHash] = field(default_factory=list)
    """Hashes that became matchable, net; disjoint from `removed`."""
    removed: list[BlockHash] = field(default_factory=list)
    batch: BatchOutcome = BatchOutcome.NONE

    @property
    def says_something(self) -> bool:
        return bool(
            self.deltas
            or self.chunks
            or self.reservations
            or self.handovers_ended
            or self.stored
            or self.removed
        )
