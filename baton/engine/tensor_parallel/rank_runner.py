"""What a rank computes with, whatever its device. A class of a device serves all ranks of a group.

Not known here: devices, processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.kv_layout import KvLayout
from baton.engine.batch import Batch, LaunchedStep, Runner, SequenceSlice
from baton.engine.parallel import SINGLE, Parallel
from baton.engine.tensor_parallel.rank_service import RankKv


class RankRunner(Runner, Protocol):
    """One rank's part of every step. `launch` serves a group of one."""

    def launch_slices(self, batch: Batch, slices: Sequence[SequenceSlice]) -> LaunchedStep:
        """On rank 0: `launch`, for a batch whose slices the other ranks run at the same time."""
        ...

    def run(self, slices: Sequence[SequenceSlice]) -> object:
        """On the other ranks: this rank's part of a step. May return before it is computed.

        Called once per step that rank 0 launches, in the same order.
        """
        ...


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """A rank with its weights and its KV pool."""

    runner: RankRunner
    layout: KvLayout
    """Of the whole model, as peers compare it."""
    num_blocks: int
    max_model_len: int
    """Tokens of prompt and output together, by the model and the configuration."""
    vocab_size: int
    pool_address: int
    pool_bytes: int
    num_scratch_blocks: int = 0
    """Behind the `num_blocks` of the engine, see `factory`."""
    pool_parallel: Parallel = SINGLE
    """Which part of the KV heads the pool holds: all of them where the ranks share one."""
    device_id: int | None = None
    """CUDA ordinal of the pool, None for host memory."""

    @property
    def kv(self) -> RankKv:
        return RankKv(
            layout=self.layout,
            parallel=self.pool_parallel,
            num_blocks=self.num_blocks,
            num_scratch_blocks=self.num_scratch_blocks,
            address=self.pool_address,
            num_bytes=self.pool_bytes,
            device_id=self.device_id,
        )
