"""The bytes of one side of a read, in the order in which they travel. Pure."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from kvtransfer.plan import BlockIds, Offsets, SidePlan


class ByteSpans(NamedTuple):
    """Contiguous bytes of a pool each: `num_bytes[i]` from offset `starts[i]` on."""

    starts: Offsets
    num_bytes: Offsets


def byte_spans(side: SidePlan, units: BlockIds) -> ByteSpans:
    """The fewest spans that hold all pieces of these checked units: unit by unit, piece by piece.

    Unlike copies, which need neighbours on both sides, a stream may be cut differently at its ends.
    """
    starts = side.starts(units).ravel()
    size = side.piece_bytes
    breaks = np.flatnonzero(np.diff(starts) != size) + 1
    firsts = np.concatenate((np.zeros(min(1, len(starts)), dtype=np.int64), breaks))
    counts = np.diff(np.concatenate((firsts, [len(starts)])))
    return ByteSpans(starts[firsts], counts * size)


class SpanCursor:
    """Goes through the spans of a pool's memory, a window of buffers at a time."""

    def __init__(self, memory: memoryview, spans: ByteSpans) -> None:
        self._memory = memory
        self._spans = spans
        self._next = 0
        self._window: deque[memoryview] = deque()
        self.num_left = int(spans.num_bytes.sum())
        """Bytes that were not passed yet."""

    def window(self, max_buffers: int) -> list[memoryview]:
        """The next buffers, as many as one call takes; empty at the end."""
        missing = max_buffers - len(self._window)
        part = slice(self._next, self._next + missing)
        for start, num_bytes in zip(
            self._spans.starts[part].tolist(), self._spans.num_bytes[part].tolist(), strict=True
        ):
            self._window.append(self._memory[start : start + num_bytes])
            self._next += 1
        return list(self._window)

    def pass_over(self, num_bytes: int) -> None:
        """So many bytes of the window are done."""
        self.num_left -= num_bytes
        while num_bytes:
            first = self._window.popleft()
            if num_bytes < len(first):
                self._window.appendleft(first[num_bytes:])
                return
            num_bytes -= len(first)
