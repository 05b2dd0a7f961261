"""A KV pool of a given block size in shared memory, and a transport over it.

Layouts here are made for their sizes: 8 KV heads of 64 bfloat16 numbers, 16 tokens a block, as many
layers as the block size asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.plan import RankPool
from kvtransfer.select import create_transport
from kvtransfer.shm_transport import ShmPool
from kvtransfer.transport import PoolRegion

SECRET = b"a secret of one benchmark run only"
EPOCH = Epoch("bench")
NUM_KV_HEADS = 8
LAYER_BYTES = NUM_KV_HEADS * 2 * 16 * 64 * 2
NUM_SCRATCH_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One rank's pool. `block_bytes` is that of the whole model, a multiple of 32 KiB."""

    block_bytes: int
    num_blocks: int
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def layout(self) -> KvLayout:
        layers, rest = divmod(self.block_bytes, LAYER_BYTES)
        if rest or not layers:
            raise ValueError(f"block of {self.block_bytes} bytes; take a multiple of {LAYER_BYTES}")
        return KvLayout("bench", layers, NUM_KV_HEADS, 64, 16, "bfloat16")

    @property
    def rank_block_bytes(self) -> int:
        return self._rank_pool.block_bytes

    @property
    def num_bytes(self) -> int:
        return self._rank_pool.num_bytes

    @property
    def _rank_pool(self) -> RankPool:
        total = self.num_blocks + NUM_SCRATCH_BLOCKS
        return RankPool(self.layout, self.tp_rank, self.tp_size, total)


@dataclass(frozen=True, slots=True)
class Side:
    """A pool and the transport over it."""

    memory: NDArray[np.uint8]
    """[num_blocks + scratch, block bytes of the rank]"""
    transport: MoverTransport


def open_side(name: str, kind: str, spec: PoolSpec, *, seed: int) -> Side:
    """A pool of random bytes, every page resident, offered or read by transport `kind`."""
    pool = ShmPool.create(spec.num_bytes)
    memory = np.frombuffer(pool.memory, dtype=np.uint8)
    memory[:] = random_bytes(len(memory), seed)
    region = PoolRegion(
        address=pool.address,
        num_bytes=spec.num_bytes,
        num_blocks=spec.num_blocks + NUM_SCRATCH_BLOCKS,
        layout=spec.layout,
        num_scratch_blocks=NUM_SCRATCH_BLOCKS,
        tp_rank=spec.tp_rank,
        tp_size=spec.tp_size,
    )
    identity = PeerIdentity(WorkerId(name), EPOCH)
    transport = create_transport(kind, region, identity, SECRET, shared_pool=pool)
    return Side(memory.reshape(-1, spec.rank_block_bytes), transport)


def random_bytes(num_bytes: int, seed: int) -> NDArray[np.uint8]:
    """The same for the same seed, and a shorter call gives the beginning of a longer one."""
    return np.frombuffer(np.random.default_rng(seed).bytes(num_bytes), dtype=np.uint8)
