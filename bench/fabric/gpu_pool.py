"""Pools of a worker on one GPU, in memory whose content is known, and the transport over them.

All pools of a benchmark lie at the start of one arena, one behind another, so that many shapes are
measured without filling memory anew. Layouts are made for block sizes as in `pool`. A worker's
ranks share a process and a GPU here: what crosses the link does not depend on that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from bench.fabric.pool import EPOCH, NUM_KV_HEADS, SECRET
from kvtransfer.group_transport import GroupTransport
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.plan import BlockIds, RankPool, plan_pair
from kvtransfer.select import create_transport
from kvtransfer.transport import PoolRegion

HEAD_DIM = 64
NUM_SCRATCH_BLOCKS = 4
FILL_WORDS = 1 << 26
CHECKED_WORDS = 1 << 24


@dataclass(frozen=True, slots=True)
class WorkerPools:
    """The pools of a worker's ranks."""

    num_layers: int
    num_blocks: int
    """Of each rank, scratch blocks included."""
    block_size: int = 16
    tp_size: int = 1

    @property
    def layout(self) -> KvLayout:
        return KvLayout(
            "bench", self.num_layers, NUM_KV_HEADS, HEAD_DIM, self.block_size, "bfloat16"
        )

    @property
    def ranks(self) -> list[RankPool]:
        return [
            RankPool(self.layout, rank, self.tp_size, self.num_blocks)
            for rank in range(self.tp_size)
        ]

    @property
    def starts(self) -> list[int]:
        """Of each rank's pool in the arena, in bytes."""
        return [rank * pool.num_bytes for rank, pool in enumerate(self.ranks)]

    @property
    def num_bytes(self) -> int:
        return sum(pool.num_bytes for pool in self.ranks)


def make_arena(num_bytes: int, device: torch.device, *, seed: int | None) -> Tensor:
    """[num_bytes / 4] int32: word i is `word_of(i, seed)`, or 0 without a seed."""
    arena = torch.zeros(num_bytes // 4, dtype=torch.int32, device=device)
    if seed is not None:
        for start in range(0, len(arena), FILL_WORDS):
            part = arena[start : start + FILL_WORDS]
            part.copy_(word_of(torch.arange(start, start + len(part), device=device), seed))
    return arena


def word_of(indices: Tensor, seed: int) -> Tensor:
    """A number without a pattern that anybody could compress or mistake for its neighbour."""
    mixed = (indices * 0x9E3779B1 + seed * 0x85EBCA6B) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    return mixed.to(torch.int32)


def open_rank_transports(
    name: str, pools: WorkerPools, arena: Tensor, *, kind: str
) -> list[MoverTransport]:
    """One per rank. Raises what `create_transport` raises."""
    transports = []
    for pool, start in zip(pools.ranks, pools.starts, strict=True):
        region = region_of(pool, arena, start)
        identity = PeerIdentity(WorkerId(name), Epoch(EPOCH))
        transports.append(create_transport(kind, region, identity, SECRET))
    return transports


def region_of(pool: RankPool, arena: Tensor, start: int) -> PoolRegion:
    return PoolRegion(
        arena.data_ptr() + start,
        pool.num_bytes,
        pool.num_blocks,
        pool.layout,
        device_id=arena.device.index,
        num_scratch_blocks=NUM_SCRATCH_BLOCKS,
        tp_rank=pool.tp_rank,
        tp_size=pool.tp_size,
    )


def join(transports: list[MoverTransport], pools: WorkerPools, arena: Tensor) -> GroupTransport:
    region = region_of(pools.ranks[0], arena, 0)
    return GroupTransport(transports, region=region, secret=SECRET)


def check_arrived(
    owner: WorkerPools,
    reader: WorkerPools,
    arena: Tensor,
    units: tuple[BlockIds, BlockIds],
    *,
    seed: int,
) -> None:
    """Raises RuntimeError unless the reader's `arena` holds, in its units, what the owner has in
    its own: a rate of wrong bytes is none."""
    for local, local_start in zip(reader.ranks, reader.starts, strict=True):
        for remote, remote_start in zip(owner.ranks, owner.starts, strict=True):
            plan = plan_pair(remote, local)
            if plan is None:
                continue
            width = plan.local.piece_bytes // 4
            sources = (plan.remote.starts(units[0]).ravel() + remote_start) // 4
            targets = (plan.local.starts(units[1]).ravel() + local_start) // 4
            step = max(1, CHECKED_WORDS // width)
            for first in range(0, len(sources), step):
                here, there = (
                    torch.from_numpy(words[first : first + step]).to(arena.device)[:, None]
                    + torch.arange(width, device=arena.device)
                    for words in (targets, sources)
                )
                if not torch.equal(arena[here], word_of(there, seed)):
                    raise RuntimeError(
                        f"rank {local.tp_rank} holds wrong bytes of the owner's rank "
                        f"{remote.tp_rank}"
                    )
