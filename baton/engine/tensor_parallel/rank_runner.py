"""What a rank computes with, whatever its device. A class of a device serves all ranks of a group.

Not known here: devices, processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.kv_layout import KvLayout
from baton.engine.batch import Batch, LaunchedStep, Runner, SequenceSlice


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
    """Of the pool that peers read: the whole model's on a CPU, where the ranks share one."""
    num_blocks: int
    max_model_len: int
    """Tokens of prompt and output together, by the model and the configuration."""
    vocab_size: int
    pool_address: int
    pool_bytes: int
