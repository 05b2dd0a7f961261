"""What other workers may read here: finished blocks of a sequence, or a cached prefix.

PREFILL    0. while the last chunk's step runs, it is told how many layers of its blocks are
              complete (`LayersDone`), without a lease: the step holds the blocks until it is over
           1. once a chunk's step is over, the blocks it completed are leased and announced
           2. the last announcement also covers the partial last block, with the first token
           3. the sequence is gone; its blocks stay leased until the reader is done with them
handover   the same of a sequence that generates, see `handover`
prefix     the leading blocks of a hash chain that are cached now, leased at once

A lease here is a count on blocks, kept per request until `release`. Expiry, epochs and readers
belong to the transfer server.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from baton.core.block import BlockHash, BlockId
from baton.core.errors import InvalidRequest
from baton.core.request import RequestId, TokenDelta
from baton.engine.block_pool import BlockPool
from baton.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """Blocks of one sequence that are complete in memory and leased."""

    request_id: RequestId
    first_block_index: int
    """Index in the sequence of block_ids[0]."""
    block_ids: tuple[BlockId, ...]
    is_last: bool
    first_token: TokenDelta | None = None
    """With is_last. Of PREFILL work: the delta that also went to the router; of a handover: all
    output tokens from the first on that the reader does not know."""
    fill_id: int = 0
    """With is_last: that of the LayersDone of these blocks, 0 when there were none."""


@dataclass(frozen=True, slots=True)
class LayersDone:
    """The first layers of blocks that a step is computing are complete in memory, on every rank."""

    request_id: RequestId
    fill_id: int
    """Of the step; no other of this process has it."""
    first_block_index: int
    """Index in the sequence of block_ids[0]; the blocks before are announced."""
    block_ids: tuple[BlockId, ...]
    """To the end of the prompt."""
    num_layers: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks held for KV from elsewhere.

    Of DECODE or TAKEOVER work: answered by exactly one `activate` or `abandon`. Of an import: by
    exactly one `finish_import` or `abandon_import`.
    """

    request_id: RequestId
    block_ids: tuple[BlockId, ...]
    """Blocks of all tokens the request came with, in order; of TAKEOVER work those that its
    owner may generate meanwhile too. Of an import: one for each hash, as far as they fit."""
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

    def lease_prefix(
        self, lease_id: RequestId, hashes: SequenceOf[BlockHash]
    ) -> tuple[BlockId, ...]:
        """Lease the longest leading part of `hashes` in the pool; empty: nothing, and no lease.

        Raises InvalidRequest for an id that holds a lease.
        """
        if lease_id in self._leased:
            raise InvalidRequest(f"lease {lease_id} exists already; use a new id")
        block_ids = self._pool.match(hashes)
        if block_ids:
            self._pool.lease(block_ids)
            self._leased[lease_id] = block_ids
        return tuple(block_ids)

    def announce(
        self, sequence: Sequence, num_blocks: int, last: TokenDelta | None = None
    ) -> ChunkDone | None:
        """Lease the first `num_blocks` blocks of a sequence, as far as they are not yet.

        None when there is nothing new to tell; `last` makes it the last announcement. All of
        these blocks are complete.
        """
        first = sequence.num_announced_blocks
        if last is None and num_blocks <= first:
            return None
        block_ids = tuple(sequence.block_table[first:num_blocks])
        self._pool.lease(block_ids)
        self._leased.setdefault(sequence.request_id, []).extend(block_ids)
        sequence.num_announced_blocks = num_blocks
        is_last = last is not None
        fill_id = sequence.fill_id if is_last else 0
        return ChunkDone(sequence.request_id, first, block_ids, is_last, last, fill_id)

    def release(self, request_id: RequestId) -> None:
        """End the leases of a request; unknown requests are ignored."""
        self._pool.unlease(self._leased.pop(request_id, []))


def complete_partial_block(sequence: Sequence, pool: BlockPool, block_size: int) -> int:
    """Declare the block complete that holds the last settled tokens, should it not be full.

    Returns how many blocks hold KV. Nothing may be in flight. The block gets no hash: another
    holder would write what follows.
    """
    num_blocks = -(-sequence.num_settled_tokens // block_size)
    if num_blocks > sequence.num_committed_blocks:
        pool.commit(sequence.block_table[num_blocks - 1], None)
    return num_blocks
