"""The laws of block accounting, checked by recounting. For tests, idle checks and a gauge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from baton.core.block import BlockId
from baton.core.errors import InternalError
from baton.engine.block_state import Block, BlockState, broken
from baton.engine.sequence import Sequence

_HELD = (BlockState.RESERVED, BlockState.FILLING, BlockState.ACTIVE)


def check_block(block: Block) -> None:
    """Raises InternalError when the fields of one block contradict each other."""
    state = block.state
    laws = (
        ("has a holder exactly when held", (block.ref_count > 0) == (state in _HELD)),
        ("is shared only when complete", block.ref_count < 2 or state is BlockState.ACTIVE),
        (
            "is leased only when complete",
            block.lease_count == 0 or state in (BlockState.ACTIVE, BlockState.LEASED),
        ),
        ("is leased while LEASED", state is not BlockState.LEASED or block.lease_count > 0),
        ("has a hash while CACHED", state is not BlockState.CACHED or bool(block.block_hash)),
        (
            "has a hash only when complete",
            block.block_hash is None
            or state in (BlockState.ACTIVE, BlockState.CACHED, BlockState.LEASED),
        ),
        ("is saved only under a hash", not block.is_saved or block.block_hash is not None),
        ("is cold only while leased", not block.is_cold or block.lease_count > 0),
    )
    for law, holds in laws:
        if not holds:
            raise broken("check_integrity", block, f"a block {law}")


def check_holders(
    blocks: Iterable[Block], tables: Iterable[SequenceOf[BlockId]], leased: Iterable[BlockId]
) -> None:
    """Raises InternalError unless tables and leases name each block as often as it counts."""
    holders = Counter(b for table in tables for b in table)
    leases = Counter(leased)
    for block in blocks:
        named = (holders[block.block_id], leases[block.block_id])
        if named != (block.ref_count, block.lease_count):
            raise InternalError(
                f"block {block.block_id} counts {block.ref_count} holders and "
                f"{block.lease_count} leases; tables and leases name it {named} times"
            )


def check_sequence(sequence: Sequence, block_size: int) -> None:
    """Raises InternalError when a sequence's progress and its blocks contradict each other."""
    computed, held = sequence.num_computed_tokens, len(sequence.block_table)
    settled, in_flight = sequence.num_settled_tokens, sequence.num_in_flight_tokens
    laws = (
        ("what is computed fits the table", computed <= held * block_size),
        ("what is computed is known", computed <= sequence.num_tokens),
        ("what is in flight is computed", 0 <= in_flight <= computed),
        ("what is pending is in flight", 0 <= sequence.num_pending_tokens <= in_flight),
        ("what is committed is settled", sequence.num_committed_blocks * block_size <= settled),
        ("what is announced is held", sequence.num_announced_blocks <= held),
        ("a table names a block once", len(set(sequence.block_table)) == held),
    )
    for law, holds in laws:
        if not holds:
            raise InternalError(f"sequence {sequence.request_id} broke a law: {law}")
