"""The prefill side of the hand-off: which finished blocks to announce, and their leases.

1. once a chunk's step is over, the blocks it completed are leased and announced (`ChunkDone`)
2. the last announcement also covers the partial last block and carries the first token
3. the sequence is gone; its blocks stay leased until the reader is done with them

A lease here is a count on blocks, kept per request until `release`. Expiry, epochs and readers
belong to the transfer server.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.block import BlockId
from baton.core.request import RequestId, TokenDelta
from baton.engine.block_pool import BlockPool
from baton.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """Blocks of a PREFILL request that are complete in memory and leased."""

    request_id: RequestId
    first_block_index: int
    """Index in the sequence of block_ids[0]."""
    block_ids: tuple[BlockId, ...]
    is_last: bool
    first_token: TokenDelta | None = None
    """With is_last: the delta that also went to the router."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks held for a DECODE request; answered by exactly one `activate` or `abandon`."""

    request_id: RequestId
    block_ids: tuple[BlockId, ...]
    """Blocks of all tokens the request came with, in order."""
    num_cached_blocks: int
    """Leading blocks that are valid already; the others must be read."""


class LeaseTable:
    """Leased blocks by request."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._leased: dict[RequestId, list[BlockId]] = {}

    def __len__(self) -> int:
        return len(self._leased)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._leased

    def block_ids(self) -> Iterable[BlockId]:
        """Every leased block, once per lease."""
        for block_ids in self._leased.values():
            yield from block_ids

    def announce(
        self, sequence: Sequence, block_size: int, first_token: TokenDelta | None
    ) -> ChunkDone | None:
        """Lease what became complete since the last call; None when nothing did.

        With `first_token` all blocks of the sequence are complete. Call after the full blocks
        are committed and before the sequence lets go of them.
        """
        first = sequence.num_announced_blocks
        if first_token is None:
            end = sequence.num_settled_tokens // block_size
            if end == first:
                return None
        else:
            end = len(sequence.block_table)
            if end > sequence.num_committed_blocks:
                self._pool.commit(sequence.block_table[-1], None)
        block_ids = tuple(sequence.block_table[first:end])
        self._pool.lease(block_ids)
        self._leased.setdefault(sequence.request_id, []).extend(block_ids)
        sequence.num_announced_blocks = end
        return ChunkDone(
            sequence.request_id, first, block_ids, first_token is not None, first_token
        )

    def release(self, request_id: RequestId) -> None:
        """End the leases of a request; unknown requests are ignored."""
        self._pool.unlease(self._leased.pop(request_id, []))
