"""Handing a running sequence on to another worker, which reads its KV while it goes on.

1. start    what is finished is leased and announced, and after every step what that step finished
2. freeze   no step computes it any more; once none in flight does, the last announcement follows:
            the partial block too, and the tokens the reader does not know
3. finish   the reader has everything, and the sequence ends here without a reason;
   resume   or it goes on where it was, at any time, as if nothing had been

    tokens      0 . . . | 4 . . . | 8 9        frozen: the last token's KV is nowhere, the reader
    KV          x x x x | x x x x | x          computes it; the partial block is complete as it is
    leased      -------   -------   -------    and is written again only after `resume`

A handover that nobody finishes can end by itself: the sequence is preempted (never once frozen) or
comes to its own end. Its lease stands until the caller releases it, like every other.

Not known here: the reader, deadlines, what a lease is worth to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.errors import InternalError, InvalidRequest, NotFound
from baton.core.request import RequestId, TokenDelta, Work
from baton.engine.block_pool import BlockPool
from baton.engine.handoff import ChunkDone, LeaseTable, complete_partial_block
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class _Handover:
    sequence: Sequence
    num_known_tokens: int
    """Output tokens that the reader has from elsewhere."""


class HandoverTable:
    """Sequences that are being handed on, by request."""

    def __init__(
        self, pool: BlockPool, leases: LeaseTable, scheduler: Scheduler, *, block_size: int
    ) -> None:
        self._pool = pool
        self._leases = leases
        self._scheduler = scheduler
        self._block_size = block_size
        self._handovers: dict[RequestId, _Handover] = {}
        self._freezing: dict[RequestId, _Handover] = {}
        """Those that wait for steps in flight."""

    def __len__(self) -> int:
        return len(self._handovers)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._handovers

    def start(self, sequence: Sequence, num_known_tokens: int) -> ChunkDone | None:
        """Announce what is finished already; None when no block is.

        Raises NotFound for a sequence that holds no KV to read, InvalidRequest for one that is
        handed on already, or leased, or that has fewer output tokens than the reader knows.
        """
        request_id = sequence.request_id
        if sequence.work is Work.PREFILL or sequence.status is not SequenceStatus.RUNNING:
            raise NotFound(
                f"request {request_id} cannot be handed on: its work is {sequence.work.value} and "
                f"it is {sequence.status.value}, not generating"
            )
        if request_id in self._handovers or request_id in self._leases:
            raise InvalidRequest(
                f"request {request_id} is leased to a reader already; end that lease first"
            )
        num_output_tokens = sequence.num_known_output_tokens
        if not 0 <= num_known_tokens <= num_output_tokens:
            raise InvalidRequest(
                f"request {request_id} has {num_output_tokens} output tokens here, the reader "
                f"cannot know {num_known_tokens}"
            )
        self._handovers[request_id] = _Handover(sequence, num_known_tokens)
        return self.announce(sequence)

    def announce(self, sequence: Sequence) -> ChunkDone | None:
        """What became complete since the last call, if the sequence is being handed on."""
        if sequence.request_id not in self._handovers:
            return None
        return self._leases.announce(sequence, sequence.num_committed_blocks)

    def freeze(self, request_id: RequestId) -> None:
        """Launch no further step for it; `frozen_now` tells when it stands. Idempotent.

        A sequence that is not generating yet first computes all tokens but its last. Raises
        NotFound for one that is not handed on.
        """
        handover = self._handovers.get(request_id)
        if handover is None:
            raise NotFound(f"request {request_id} is not being handed on")
        if handover.sequence.status is not SequenceStatus.FROZEN:
            handover.sequence.is_freezing = True
            self._freezing[request_id] = handover

    def frozen_now(self) -> list[ChunkDone]:
        """The last announcements of sequences that stand still from now on."""
        due = [h for h in self._freezing.values() if _stands_still(h.sequence)]
        return [self._freeze(handover) for handover in due]

    def resume(self, request_id: RequestId) -> None:
        """Stop announcing and let the sequence go on; unknown requests are ignored.

        Raises InternalError while a frozen sequence is leased: it would write to a leased block.
        """
        handover = self._handovers.get(request_id)
        if handover is None:
            return
        sequence = handover.sequence
        if sequence.status is SequenceStatus.FROZEN:
            if request_id in self._leases:
                raise InternalError(f"request {request_id} resumes under a lease; release it first")
            num_full, num_rest = divmod(sequence.num_computed_tokens, self._block_size)
            if num_rest:
                self._pool.reopen(sequence.block_table[num_full])
            self._scheduler.resume(sequence)
        self.drop(sequence)

    def lease_ended(self, request_id: RequestId) -> None:
        """Announce nothing more: what is leased from here on would stay leased."""
        handover = self._handovers.get(request_id)
        if handover is not None and handover.sequence.status is not SequenceStatus.FROZEN:
            self.drop(handover.sequence)

    def frozen(self, request_id: RequestId) -> Sequence:
        """Raises NotFound for a sequence that does not stand still."""
        handover = self._handovers.get(request_id)
        if handover is None or handover.sequence.status is not SequenceStatus.FROZEN:
            raise NotFound(f"request {request_id} is not frozen on this worker")
        return handover.sequence

    def drop(self, sequence: Sequence) -> bool:
        """Forget the handover of a sequence; False when there was none. Its lease stays."""
        request_id = sequence.request_id
        if self._handovers.pop(request_id, None) is None:
            return False
        self._freezing.pop(request_id, None)
        sequence.is_freezing = False
        sequence.num_announced_blocks = 0
        return True

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises InternalError unless exactly the sequences handed on are marked as such."""
        known = {id(sequence) for sequence in sequences}
        frozen = {id(sequence) for sequence in self._scheduler.frozen.values()}
        for request_id, handover in self._handovers.items():
            sequence = handover.sequence
            is_frozen = sequence.status is SequenceStatus.FROZEN
            is_freezing = request_id in self._freezing
            laws = (
                ("is of a known sequence", id(sequence) in known),
                ("runs or is frozen", is_frozen or sequence.status is SequenceStatus.RUNNING),
                ("is frozen in the scheduler too", is_frozen == (id(sequence) in frozen)),
                ("stands still when frozen", not is_frozen or _stands_still(sequence)),
                (
                    "is freezing while marked",
                    sequence.is_freezing == is_freezing,
                ),
            )
            for law, holds in laws:
                if not holds:
                    raise InternalError(f"handover of {request_id} broke a law: it {law}")
            frozen.discard(id(sequence))
        if frozen or not self._freezing.keys() <= self._handovers.keys():
            raise InternalError("a sequence is frozen and nobody hands it on")

    def _freeze(self, handover: _Handover) -> ChunkDone:
        sequence = handover.sequence
        del self._freezing[sequence.request_id]
        sequence.is_freezing = False
        self._scheduler.freeze(sequence)
        num_blocks = complete_partial_block(sequence, self._pool, self._block_size)
        first = handover.num_known_tokens
        unknown = TokenDelta(sequence.request_id, first, sequence.output_token_ids[first:])
        chunk = self._leases.announce(sequence, num_blocks, unknown)
        assert chunk is not None, "the last announcement is made in any case"
        return chunk


def _stands_still(sequence: Sequence) -> bool:
    """All tokens but the last are computed, and nothing is in flight."""
    is_settled = not sequence.num_in_flight_tokens
    return is_settled and sequence.num_computed_tokens >= sequence.num_tokens - 1
