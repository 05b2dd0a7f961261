"""Which bytes a read moves: from which rank, which part of which block, in which runs. Pure.

Ranks of a tensor-parallel group hold [num_blocks, heads of the rank, layers, 2, block_size,
head_dim]; block ids mean the same on all of them. A reading rank takes each of its heads from one
rank of the owner that has it:

    owner tp 2      rank 0: heads 0 1 2 3      rank 1: heads 4 5 6 7
    reader tp 4     0: 0 1    1: 2 3           2: 4 5    3: 6 7       one slice of every block
    reader tp 1     0: 0 1 2 3                 0: 4 5 6 7             two slices of every block

With fewer heads than ranks a head is replicated on num_ranks / num_heads of them (MLA: one head,
on all), and the readers spread over its owners.

Movement is counted in units: a unit has the tokens of the smaller block of the two pools. Between
equal block sizes a unit is a block and a range of its heads one piece. Otherwise a piece is what
one head of one layer has of K or of V, since the tokens lie inside of that:

    remote, 16 tokens a block     unit 8: block 8     unit 9: block 9
    local, 64 tokens a block      unit 8: tokens 0..15 of block 2, unit 9: tokens 16..31 of it

And runs of consecutive ids:

    remote  4 5 6 9        runs  (4 -> 0, 3 blocks), (9 -> 7, 1 block)
    local   0 1 2 7

A prompt's last blocks can be read layer by layer while they are computed. The plan for that has
one unit per layer of each of the units above: layer l of unit u is unit u * num_layers + l of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.core.block import BlockId
from baton.core.errors import IncompatiblePeer, TransferError
from baton.core.kv_layout import KV_DTYPE_BYTES, KvLayout
from baton.core.worker_info import WorkerId

BlockIds = NDArray[np.int32]
Offsets = NDArray[np.int64]

MAX_TP_SIZE = 64
"""A card that claims more is refused; plans are made per pair of ranks."""


def heads_of_rank(num_kv_heads: int, rank: int, size: int) -> range:
    """KV heads of the whole model that a rank of a group of `size` holds.

    Raises IncompatiblePeer when heads and ranks do not divide one another.
    """
    if not 1 <= size <= MAX_TP_SIZE or not 0 <= rank < size:
        raise IncompatiblePeer(f"tp_rank {rank} of {size} ranks; at most {MAX_TP_SIZE} are allowed")
    if num_kv_heads % size == 0:
        share = num_kv_heads // size
        return range(rank * share, (rank + 1) * share)
    if size % num_kv_heads == 0:
        head = rank // (size // num_kv_heads)
        return range(head, head + 1)
    raise IncompatiblePeer(
        f"{num_kv_heads} KV heads cannot lie on {size} ranks; "
        f"take a divisor or a multiple of {num_kv_heads}"
    )


def plan_sources(
    remote_size: int, local_rank: int, local_size: int, num_kv_heads: int
) -> dict[int, range]:
    """Owner's ranks to read from, in order, and the heads (of the whole model) to take there.

    Each head of `local_rank` is taken once. Readers of a replicated head take its owners in turn,
    so that none of these serves more than its share. Raises as `heads_of_rank`.
    """
    taken: dict[int, range] = {}
    # Ranks that hold the same heads, here and there.
    owners_of_head = max(1, remote_size // num_kv_heads)
    turn = local_rank % max(1, local_size // num_kv_heads)
    wanted = heads_of_rank(num_kv_heads, local_rank, local_size)
    for first_owner in range(0, remote_size, owners_of_head):
        owner = first_owner + turn % owners_of_head
        held = heads_of_rank(num_kv_heads, owner, remote_size)
        part = range(max(wanted.start, held.start), min(wanted.stop, held.stop))
        if part:
            taken[owner] = part
    return taken


@dataclass(frozen=True, slots=True)
class RankPool:
    """The KV pool of one rank, as it describes itself. Raises IncompatiblePeer when impossible."""

    layout: KvLayout
    """Of the whole model."""
    tp_rank: int
    tp_size: int
    num_blocks: int

    def __post_init__(self) -> None:
        heads_of_rank(self.layout.num_kv_heads, self.tp_rank, self.tp_size)
        if not 1 <= self.num_blocks <= np.iinfo(np.int32).max:
            raise IncompatiblePeer(f"a pool of {self.num_blocks} blocks; 1 to 2^31 - 1 are allowed")

    @property
    def heads(self) -> range:
        return heads_of_rank(self.layout.num_kv_heads, self.tp_rank, self.tp_size)

    @property
    def block_bytes(self) -> int:
        return len(self.heads) * self.layout.head_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True, eq=False)
class SidePlan:
    """Where the pieces of each unit lie on one side of a pair.

    Piece e of unit u starts at  (u // n) * block_bytes + offsets[u % n, e],  n = units_per_block,
    and is piece_bytes long.
    """

    num_blocks: int
    block_bytes: int
    offsets: Offsets
    """[units_per_block, num_pieces]"""
    piece_bytes: int

    def __post_init__(self) -> None:
        first, last = int(self.offsets.min()), int(self.offsets.max())
        if first < 0 or last + self.piece_bytes > self.block_bytes:
            raise TransferError(
                f"pieces of bytes {first} to {last + self.piece_bytes} leave their block of "
                f"{self.block_bytes} bytes"
            )

    @property
    def units_per_block(self) -> int:
        return int(self.offsets.shape[0])

    @property
    def num_units(self) -> int:
        return self.num_blocks * self.units_per_block

    @property
    def unit_bytes(self) -> int:
        """That this pair of ranks moves of each unit."""
        return int(self.offsets.shape[1]) * self.piece_bytes

    def starts(self, units: BlockIds) -> Offsets:
        """[num_units, num_pieces] offsets in the pool, for checked units."""
        blocks, parts = np.divmod(units.astype(np.int64), self.units_per_block)
        starts: Offsets = blocks[:, None] * self.block_bytes + self.offsets[parts]
        return starts


@dataclass(frozen=True, slots=True, eq=False)
class PairPlan:
    """How one reading rank gets its part of each unit from one owning rank: piece e to piece e."""

    remote: SidePlan
    local: SidePlan
    is_by_layer: bool = False
    """Units are those of single layers."""

    @property
    def is_whole_blocks(self) -> bool:
        """A unit is one whole block on both sides, so that consecutive ones are one copy."""
        return all(
            side.units_per_block == 1 and side.piece_bytes == side.block_bytes
            for side in (self.remote, self.local)
        )

    def copies(self, remote: BlockIds, local: BlockIds) -> list[Copy]:
        """The fewest contiguous copies that move checked units remote[i] to local[i]: in order, or
        by layer in the order of our pool."""
        if not len(remote):
            return []
        sources = self.remote.starts(remote).ravel()
        targets = self.local.starts(local).ravel()
        if self.is_by_layer:
            # The layers of a head are neighbours in memory, not in the order of the units.
            order = np.argsort(targets)
            sources, targets = sources[order], targets[order]
        size = self.local.piece_bytes
        breaks = np.flatnonzero((np.diff(sources) != size) | (np.diff(targets) != size)) + 1
        firsts = np.concatenate(([0], breaks))
        counts = np.diff(np.concatenate((firsts, [len(sources)])))
        return [
            Copy(source, target, count * size)
            for source, target, count in zip(
                sources[firsts].tolist(), targets[firsts].tolist(), counts.tolist(), strict=True
            )
        ]


class Copy(NamedTuple):
    """One contiguous copy between two pools; offsets in bytes."""

    remote: int
    local: int
    num_bytes: int


def layout_obstacle(remote: KvLayout, local: KvLayout) -> str:
    """Why KV of one layout cannot be read into the other, empty when it can.

    Block sizes may differ when one divides the other.
    """
    differences = [
        f"{name}: {getattr(local, name)} here, {getattr(remote, name)} there"
        for name in ("model_id", "num_layers", "num_kv_heads", "head_dim", "dtype")
        if getattr(local, name) != getattr(remote, name)
    ]
    small, large = sorted((remote.block_size, local.block_size))
    if large % small:
        differences.append(
            f"block_size: {local.block_size} here, {remote.block_size} there; "
            "take equal ones or a multiple"
        )
    return ", ".join(differences)


def plan_pair(remote: RankPool, local: RankPool, *, by_layer: bool = False) -> PairPlan | None:
    """What the local rank takes from this remote rank; None when it takes nothing from it.

    `by_layer`: in units of single layers. Raises IncompatiblePeer when the pools do not fit one
    another.
    """
    obstacle = layout_obstacle(remote.layout, local.layout)
    if obstacle:
        raise IncompatiblePeer(f"KV does not fit: {obstacle}")
    sources = plan_sources(remote.tp_size, local.tp_rank, local.tp_size, local.layout.num_kv_heads)
    heads = sources.get(remote.tp_rank)
    if heads is None:
        return None
    unit_tokens = min(remote.layout.block_size, local.layout.block_size)
    is_split = remote.layout.block_size != local.layout.block_size
    side = _side_by_layer if by_layer else _side
    return PairPlan(
        side(remote, heads, unit_tokens, is_split=is_split),
        side(local, heads, unit_tokens, is_split=is_split),
        by_layer,
    )


def layer_units(units: BlockIds, layers: range, num_layers: int) -> BlockIds:
    """Units of a plan by layer: these layers of checked units of the plan of whole ones."""
    within = np.arange(layers.start, layers.stop, dtype=np.int32)
    spread: BlockIds = (units[:, None] * np.int32(num_layers) + within[None, :]).ravel()
    return spread


def _side_by_layer(pool: RankPool, heads: range, unit_tokens: int, *, is_split: bool) -> SidePlan:
    """Part (p, l) of a block are layer l's rows of its tokens p * unit_tokens and so on."""
    layout = pool.layout
    token_bytes = layout.head_dim * KV_DTYPE_BYTES[layout.dtype]
    row_bytes = layout.block_size * token_bytes
    first = heads.start - pool.heads.start
    own_heads = np.arange(first, first + len(heads), dtype=np.int64)
    layers = np.arange(layout.num_layers, dtype=np.int64)
    # [layers, heads], of a head's K and V rows of the layer
    starts = own_heads[None, :] * layout.head_bytes + layers[:, None] * (2 * row_bytes)
    if not is_split:
        return SidePlan(pool.num_blocks, pool.block_bytes, starts, 2 * row_bytes)
    parts = np.arange(layout.block_size // unit_tokens, dtype=np.int64) * unit_tokens * token_bytes
    rows = np.arange(2, dtype=np.int64) * row_bytes
    # [parts, layers, heads, 2]
    offsets = parts[:, None, None, None] + starts[None, :, :, None] + rows
    num_parts = len(parts) * layout.num_layers
    return SidePlan(
        pool.num_blocks, pool.block_bytes, offsets.reshape(num_parts, -1), unit_tokens * token_bytes
    )


def _side(pool: RankPool, heads: range, unit_tokens: int, *, is_split: bool) -> SidePlan:
    layout = pool.layout
    first = heads.start - pool.heads.start
    if not is_split:
        offsets = np.array([[first * layout.head_bytes]], dtype=np.int64)
        piece_bytes = len(heads) * layout.head_bytes
        return SidePlan(pool.num_blocks, pool.block_bytes, offsets, piece_bytes)
    token_bytes = layout.head_dim * KV_DTYPE_BYTES[layout.dtype]
    # K or V of one layer of one head, all tokens of the block.
    rows_per_head = layout.num_layers * 2
    rows = np.arange(first * rows_per_head, (first + len(heads)) * rows_per_head, dtype=np.int64)
    parts = np.arange(layout.block_size // unit_tokens, dtype=np.int64)
    offsets = rows[None, :] * (layout.block_size * token_bytes) + parts[:, None] * (
        unit_tokens * token_bytes
    )
    return SidePlan(pool.num_blocks, pool.block_bytes, offsets, unit_tokens * token_bytes)


class Run(NamedTuple):
    """`num_blocks` blocks that are consecutive on both sides: one contiguous copy."""

    remote: int
    local: int
    num_blocks: int


def checked_ids(block_ids: Sequence[BlockId] | BlockIds, num_blocks: int, whose: str) -> BlockIds:
    """The ids as an array. Raises TransferError for an id outside the pool."""
    ids = np.asarray(block_ids, dtype=np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= num_blocks):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise TransferError(f"block id {bad} is outside {whose} pool of {num_blocks} blocks")
    return ids.astype(np.int32)


def checked_pair(
    remote: Sequence[BlockId] | BlockIds,
    local: Sequence[BlockId] | BlockIds,
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


def count_runs(remote: BlockIds, local: BlockIds) -> int:
    """How many `merge_runs` makes, without a step of Python for each."""
    return len(_breaks(remote, local)) + 1 if len(remote) else 0


def _breaks(remote: BlockIds, local: BlockIds) -> Offsets:
    """Positions at which another run begins, the first left out."""
    return np.flatnonzero((np.diff(remote) != 1) | (np.diff(local) != 1)) + 1


def merge_runs(remote: BlockIds, local: BlockIds) -> list[Run]:
    """The fewest contiguous copies that move `remote[i]` to `local[i]`, in order."""
    if not len(remote):
        return []
    breaks = _breaks(remote, local)
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(remote)]))
    return [
        Run(int(remote[s]), int(local[s]), int(e - s)) for s, e in zip(starts, ends, strict=True)
    ]
