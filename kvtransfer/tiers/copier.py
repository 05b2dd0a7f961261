"""Copies between blocks of the pool and slots of host memory.

Not known here: which blocks are worth keeping, hashes, leases. The pool's owner sees to it that
blocks are neither written while they are copied out nor read while they are copied in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from baton.core.block import BlockId
from baton.core.errors import ConfigError
from kvtransfer.plan import checked_ids
from kvtransfer.transport import PoolRegion


class BlockCopier(Protocol):
    """Two threads may copy at the same time, one out and one in."""

    def register(self, arena: memoryview) -> None:
        """Once, before any copy: all slots lie in `arena`, which outlives `close`. A GPU's copier
        pins it, so that copies run at the link's speed."""
        ...

    def copy_out(self, block_ids: Sequence[BlockId], slots: Sequence[memoryview]) -> None:
        """Pool to host. All has arrived when the call returns. Raises TransferError."""
        ...

    def copy_in(self, slots: Sequence[memoryview], block_ids: Sequence[BlockId]) -> None:
        """Host to pool. All has arrived when the call returns. Raises TransferError."""
        ...

    def close(self) -> None:
        """Undo `register`. No copy is under way."""
        ...


class HostCopier:
    """For a pool in host memory."""

    def __init__(self, region: PoolRegion) -> None:
        """`region` outlives the copier. Raises ConfigError for a pool that is no host memory."""
        if region.device_id is not None:
            raise ConfigError(f"the KV pool lies in the memory of GPU {region.device_id}")
        block_bytes = region.layout.block_bytes
        self._num_blocks = region.num_blocks
        memory = (ctypes.c_uint8 * (region.num_blocks * block_bytes)).from_address(region.address)
        self._blocks = np.ctypeslib.as_array(memory).reshape(-1, block_bytes)

    def register(self, arena: memoryview) -> None:
        """Plain memory needs nothing."""

    def copy_out(self, block_ids: Sequence[BlockId], slots: Sequence[memoryview]) -> None:
        ids = checked_ids(block_ids, self._num_blocks, "our")
        for block_id, slot in zip(ids, slots, strict=True):
            np.copyto(np.frombuffer(slot, dtype=np.uint8), self._blocks[block_id])

    def copy_in(self, slots: Sequence[memoryview], block_ids: Sequence[BlockId]) -> None:
        ids = checked_ids(block_ids, self._num_blocks, "our")
        for block_id, slot in zip(ids, slots, strict=True):
            np.copyto(self._blocks[block_id], np.frombuffer(slot, dtype=np.uint8))

    def close(self) -> None:
        """Nothing was registered."""
