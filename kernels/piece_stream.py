"""Piece copies launched on a stream of their own, and when they have ended.

What a launch wrote is seen by all launches of this process that come after its `is_done`: the
kernel has ended then, and later ones start with empty caches of their own. Lists of units go to
the device through pinned memory, so a launch waits for nothing. Under Triton's interpreter, on CPU
memory, a copy has ended when its launch returns.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.piece_copy import MAX_PROGRAMS, PieceSide, compile_pieces, copy_pieces, make_side

POLL_S = 5e-5


class PieceLaunch:
    """One launch under way."""

    __slots__ = ("_event", "_units")

    def __init__(self, event: torch.cuda.Event | None, units: torch.Tensor) -> None:
        self._event = event
        # Read by the kernel; its memory is not handed out anew before this object goes.
        self._units = units

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


class PieceStream:
    """Any thread may use it."""

    def __init__(self, device_id: int | None, *, max_programs: int = MAX_PROGRAMS) -> None:
        """`device_id`: CUDA ordinal, None for host memory under the interpreter."""
        self._max_programs = max_programs
        if device_id is None:
            self._device = torch.device("cpu")
            self._stream = None
        else:
            self._device = torch.device("cuda", device_id)
            self._stream = torch.cuda.Stream(self._device)

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

    def compile(self, src: PieceSide, dst: PieceSide) -> None:
        """See `piece_copy.compile_pieces`."""
        with self._launching():
            compile_pieces(src, dst)

    def start(
        self,
        src: PieceSide,
        dst: PieceSide,
        src_units: NDArray[np.int32],
        dst_units: NDArray[np.int32],
    ) -> PieceLaunch:
        """See `piece_copy.copy_pieces`."""
        units = torch.from_numpy(np.stack((src_units, dst_units)))
        with self._launching():
            if self._stream is not None:
                units = units.pin_memory().to(self._device, non_blocking=True)
            copy_pieces(
                src,
                dst,
                src_units=units[0],
                dst_units=units[1],
                max_programs=self._max_programs,
            )
            event = None
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record(self._stream)
        return PieceLaunch(event, units)

    def _launching(self) -> AbstractContextManager[object]:
        """The stream and its device are the thread's inside."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
