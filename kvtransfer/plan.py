"""Which bytes a read moves: checks of block ids, and runs of consecutive ids. Pure.

remote  4 5 6 9        runs  (4 -> 0, 3 blocks), (9 -> 7, 1 block)
local   0 1 2 7
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.core.block import BlockId
from baton.core.errors import TransferError
from baton.core.worker_info import WorkerId

BlockIds = NDArray[np.int32]


class Run(NamedTuple):
    """`num_blocks` blocks that are consecutive on both sides: one contiguous copy."""

    remote: int
    local: int
    num_blocks: int


def checked_ids(block_ids: Sequence[BlockId], num_blocks: int, whose: str) -> BlockIds:
    """The ids as an array. Raises TransferError for an id outside the pool."""
    ids = np.asarray(block_ids, dtype=np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= num_blocks):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise TransferError(f"block id {bad} is outside {whose} pool of {num_blocks} blocks")
    return ids.astype(np.int32)


def checked_pair(
    remote: Sequence[BlockId],
    local: Sequence[BlockId],
    *,
    peer: WorkerId,
    num_remote_blocks: int,
    num_local_blocks: int,
) -> tuple[BlockIds, BlockIds]:
    """What one read moves, as arrays. Raises TransferError before anything has moved."""
    if len(remote) != len(local):
        raise TransferError(f"{len(remote)} remote blocks for {len(local)} local ones")
    return (
        checked_ids(remote, num_remote_blocks, f"{peer}'s"),
        checked_ids(local, num_local_blocks, "the local"),
    )


def merge_runs(remote: BlockIds, local: BlockIds) -> list[Run]:
    """The fewest contiguous copies that move `remote[i]` to `local[i]`, in order."""
    if not len(remote):
        return []
    breaks = np.flatnonzero((np.diff(remote) != 1) | (np.diff(local) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(remote)]))
    return [
        Run(int(remote[s]), int(local[s]), int(e - s)) for s, e in zip(starts, ends, strict=True)
    ]
