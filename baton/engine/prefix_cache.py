"""Which blocks of a sequence are known by hash, and when they may be shared.

A block enters the cache once the KV of all its tokens is computed and the step that did it is over.
A sampled token's KV is computed by the step after, so the last token never counts as computed.

    tokens      0 . . . | 4 . . . | 8 9          block_size 4, token 9 just sampled
    computed    x x x x | x x x x | x -          two blocks are complete, the third is filling

Not known here: queues, steps, leases.
"""

from __future__ import annotations

from typing import NamedTuple

from baton.core.block import BlockId, next_hash
from baton.core.request import Work
from baton.engine.block_pool import BlockPool
from baton.engine.sequence import Sequence


class PrefixCacheStats(NamedTuple):
    """Counters since start, in prompt tokens; first admissions only."""

    num_query_tokens: int
    num_hit_tokens: int


def extend_hashes(sequence: Sequence, num_blocks: int, block_size: int) -> None:
    """Continue the sequence's hash chain to `num_blocks` blocks, all of whose tokens are known.

    An empty chain stays empty: its root is known to the sender of the request alone.
    """
    hashes = sequence.block_hashes
    if not hashes:
        return
    for index in range(len(hashes), num_blocks):
        tokens = sequence.token_ids[index * block_size : (index + 1) * block_size]
        hashes.append(next_hash(hashes[-1], tokens))


def match_prefix(sequence: Sequence, pool: BlockPool, block_size: int) -> list[BlockId]:
    """Blocks in the pool that hold a prefix of the sequence.

    Where this engine computes the last known token, it does so in a block of its own: complete
    blocks are never written. After DECODE work's prompt comes one more token in any case.
    """
    if sequence.wants_prompt_logprobs:
        # A cached block says nothing of what the model thought of its tokens.
        return []
    is_followed = sequence.work is Work.DECODE and is_read_remotely(sequence)
    num_usable = sequence.num_tokens - (0 if is_followed else 1)
    return pool.match(sequence.block_hashes[: num_usable // block_size])


def is_read_remotely(sequence: Sequence) -> bool:
    """True while the KV is to come from another worker."""
    return sequence.work.reads_all_kv and sequence.num_preemptions == 0


def commit_computed(sequence: Sequence, pool: BlockPool, block_size: int) -> None:
    """Declare blocks complete whose tokens are all settled. O(1) unless a block was completed."""
    num_complete = sequence.num_settled_tokens // block_size
    if num_complete <= sequence.num_committed_blocks:
        return
    extend_hashes(sequence, num_complete, block_size)
    hashes = sequence.block_hashes
    for index in range(sequence.num_committed_blocks, num_complete):
        pool.commit(sequence.block_table[index], hashes[index] if hashes else None)
    sequence.num_committed_blocks = num_complete
