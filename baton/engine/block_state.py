"""One block's account: its state, holders, leases and hash. The transitions are in `block_pool`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from baton.core.block import BlockHash, BlockId
from baton.core.errors import InternalError


class BlockState(Enum):
    FREE = "free"
    RESERVED = "reserved"
    """Held for KV that another worker is computing or sending."""
    FILLING = "filling"
    ACTIVE = "active"
    CACHED = "cached"
    LEASED = "leased"
    """Held by leases alone."""
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class Block:
    """One block's account."""

    block_id: BlockId
    state: BlockState = BlockState.FREE
    ref_count: int = 0
    """Block tables that name it."""
    lease_count: int = 0
    block_hash: BlockHash | None = None
    """Set while this block is the cache's entry for the hash."""
    is_saved: bool = False
    """A tier was given a copy under `block_hash`, and the block has not been used since."""
    is_cold: bool = False
    """Leased from the cold end to be saved, and not used since: it goes back there."""


def broken(operation: str, block: Block, law: str) -> InternalError:
    """The error for an operation that would break a law of the pool."""
    return InternalError(
        f"{operation} of block {block.block_id} refused: {law} (it is {block.state.value}, "
        f"{block.ref_count} holders, {block.lease_count} leases)"
    )
