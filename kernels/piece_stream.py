"""Piece copies launched on a stream of their own, and when they have ended.

What a launch wrote is seen by all launches of this process that come after its `is_done`: the
kernel has ended then, and later ones start with empty caches of their own. Lists of units go to
the device through pinned memory that is kept from launch to launch, so a launch waits for nothing
and takes none. Under Triton's interpreter, on CPU memory, a copy has ended when its launch returns.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.piece_copy import MAX_PROGRAMS, CompiledPieces, PieceSide, make_side

POLL_S = 5e-5
MIN_STAGED_UNITS = 1 << 16
"""A read of all layers of 64 Ki tokens in blocks of 64 has half as many."""
NUM_FIRST_STAGES = 2
MAX_STAGES = 8
"""Of 512 KiB each and more, in both memories."""


class PieceLaunch:
    """One launch under way."""

    __slots__ = ("_event",)

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def is_done(self) -> bool:
        """What it wrote is visible to all that is launched from now on. Raises RuntimeError when
        the GPU reports an error."""
        return self._event is None or self._event.query()

    def wait(self, timeout_s: float) -> bool:
        """`is_done` within that time."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_done():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)
        return True


class _Stage:
    """Two lists of units on their way to the device."""

    def __init__(self, max_units: int, device: torch.device) -> None:
        self.max_units = max_units
        size = 2 * max_units
        self._host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._words: NDArray[np.int32] = self._host.numpy()
        self._device = torch.empty(size, dtype=torch.int32, device=device)
        self.launch: PieceLaunch | None = None
        """Of the lists in it; they are read until it has ended."""

    def send(self, src: NDArray[np.int32], dst: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """On the device, behind what was launched before."""
        count = len(src)
        self._words[:count], self._words[count : 2 * count] = src, dst
        self._device[: 2 * count].copy_(self._host[: 2 * count], non_blocking=True)
        return self._device[:count], self._device[count : 2 * count]


class PieceStream:
    """One thread starts copies; any thread may prepare them."""

    def __init__(self, device_id: int | None, *, max_programs: int = MAX_PROGRAMS) -> None:
        """`device_id`: CUDA ordinal, None for host memory under the interpreter."""
        self._max_programs = max_programs
        self._stages: list[_Stage] = []
        if device_id is None:
            self._device = torch.device("cpu")
            self._stream = None
        else:
            self._device = torch.device("cuda", device_id)
            self._stream = torch.cuda.Stream(self._device)
        # Taking memory may wait for whatever else the device does, so the first reads find some.
        for _ in range(NUM_FIRST_STAGES):
            self._add_stage(MIN_STAGED_UNITS)

    def side(
        self, address: int, offsets: NDArray[np.int64], *, block_bytes: int, piece_bytes: int
    ) -> PieceSide:
        """See `piece_copy.make_side`."""
        with self._launching():
            return make_side(
                address,
                torch.from_numpy(np.ascontiguousarray(offsets)),
                block_bytes=block_bytes,
                piece_bytes=piece_bytes,
                device=self._device,
            )

    def prepare(self, src: PieceSide, dst: PieceSide) -> CompiledPieces:
        """What `start` takes; see `piece_copy.CompiledPieces`."""
        with self._launching():
            return CompiledPieces(src, dst, max_programs=self._max_programs)

    def start(
        self,
        pieces: CompiledPieces,
        src_units: NDArray[np.int32],
        dst_units: NDArray[np.int32],
    ) -> PieceLaunch:
        """Copy one unit or more; see `piece_copy.copy_pieces`."""
        stage = self._stage(len(src_units))
        with self._launching():
            pieces.launch(*stage.send(src_units, dst_units))
            event = None
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record(self._stream)
        stage.launch = PieceLaunch(event)
        return stage.launch

    def _stage(self, num_units: int) -> _Stage:
        """One that no launch reads any more."""
        for stage in self._stages:
            if stage.max_units >= num_units and (stage.launch is None or stage.launch.is_done()):
                return stage
        return self._add_stage(max(MIN_STAGED_UNITS, 1 << (num_units - 1).bit_length()))

    def _add_stage(self, max_units: int) -> _Stage:
        with self._launching():
            stage = _Stage(max_units, self._device)
        # The allocators hand memory out anew only behind what was launched with it.
        self._stages = [*self._stages[1 - MAX_STAGES :], stage]
        return stage

    def _launching(self) -> AbstractContextManager[object]:
        """The stream and its device are the thread's inside."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
