"""Copies between blocks of a GPU's KV pool and slots of host memory, for the worker's tiers.

One copy-engine transfer per block, on streams of their own: blocks of 100 KiB and more keep the
link busy, no kernel takes multiprocessors from the model, and the compute stream waits for
nothing. The host memory is registered (pinned) once; from then on the transfers are asynchronous
and the caller's thread sleeps until they have ended.

Whoever calls sees to it that a block copied out is complete and is not written meanwhile, and
that nothing computes with a block copied in before the call has returned. Not known here: hashes,
tiers, which blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.block import BlockId
from baton.core.errors import TransferError


class _Memory:
    """Device memory as the array interface of CUDA describes it."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


class GpuBlockCopier:
    """Two threads may copy at the same time, one out and one in."""

    def __init__(self, address: int, *, num_blocks: int, block_bytes: int, device_id: int) -> None:
        """`address`: device address of a pool of contiguous blocks that outlives the copier."""
        self._device = torch.device("cuda", device_id)
        self._num_blocks = num_blocks
        memory = _Memory(address, (num_blocks, block_bytes))
        self._blocks: Tensor = torch.as_tensor(memory, device=self._device)
        self._out = torch.cuda.Stream(self._device)
        self._in = torch.cuda.Stream(self._device)
        self._registered: int | None = None

    def register(self, arena: memoryview) -> None:
        """Pin `arena`, which becomes resident by that. Raises TransferError."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(arena))
        with torch.cuda.device(self._device):
            error = torch.cuda.cudart().cudaHostRegister(address, arena.nbytes, 0)
        if int(error) != 0:
            raise TransferError(
                f"{arena.nbytes} bytes of host memory cannot be pinned (CUDA error {int(error)}); "
                "lower tiers.host_bytes or raise the limit on locked memory (ulimit -l)"
            )
        self._registered = address

    def copy_out(self, block_ids: Sequence[BlockId], slots: Sequence[memoryview]) -> None:
        """GPU to host. All has arrived when the call returns. Raises TransferError."""
        blocks = self._checked(block_ids)
        with torch.cuda.device(self._device), torch.cuda.stream(self._out):
            for block, slot in zip(blocks, slots, strict=True):
                _as_tensor(slot).copy_(block, non_blocking=True)
        self._out.synchronize()

    def copy_in(self, slots: Sequence[memoryview], block_ids: Sequence[BlockId]) -> None:
        """Host to GPU. All has arrived when the call returns. Raises TransferError."""
        blocks = self._checked(block_ids)
        with torch.cuda.device(self._device), torch.cuda.stream(self._in):
            for block, slot in zip(blocks, slots, strict=True):
                block.copy_(_as_tensor(slot), non_blocking=True)
        self._in.synchronize()

    def close(self) -> None:
        """Undo `register`. No copy is under way."""
        if self._registered is not None:
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self._registered)
            self._registered = None

    def _checked(self, block_ids: Sequence[BlockId]) -> list[Tensor]:
        bad = next((b for b in block_ids if not 0 <= b < self._num_blocks), None)
        if bad is not None:
            raise TransferError(f"block id {bad} is outside our pool of {self._num_blocks} blocks")
        return [self._blocks[b] for b in block_ids]


def _as_tensor(slot: memoryview) -> Tensor:
    return torch.frombuffer(slot, dtype=torch.uint8)
