"""Free block ids, kept as maximal runs of consecutive ids.

Consecutive ids merge into one descriptor when blocks are read by another worker, so blocks are
handed out from as few runs as possible: the smallest size class in which every run is long
enough, else the longest class there is. Runs sit in power-of-two size classes with a bit mask of
the non-empty ones, so adding an id and taking a run cost the same however large the pool is.

    ids     0 1 2 3 4 5 6 7 8 9        `add(4)` finds the run that ends at 4 and the one that
    free    . . # #   # # . . .        starts at 5 and makes 2..6 one run of length 5

Not known here: what a block holds, or why it is free.
Source: segregated fits with boundary tags, Masmano et al., "TLSF: a New Dynamic Memory Allocator
for Real-Time Systems", ECRTS 2004.
"""

from __future__ import annotations

from baton.core.block import BlockId
from baton.core.errors import InternalError


class FreeRuns:
    """The free ids of a pool of `num_blocks` blocks, all of them at first."""

    def __init__(self, num_blocks: int) -> None:
        self._length_at_start: dict[int, int] = {}
        self._start_at_end: dict[int, int] = {}
        """Keyed by the id one past the run's last."""
        self._classes: list[dict[int, None]] = [{} for _ in range(num_blocks.bit_length())]
        """Starts of the runs whose length lies in [2^k, 2^(k+1))."""
        self._class_mask = 0
        self._num_free = num_blocks
        self._insert(0, num_blocks)

    def __len__(self) -> int:
        return self._num_free

    def add(self, block_id: BlockId) -> None:
        """Give one id back; it joins the runs beside it."""
        start, length = int(block_id), 1
        left = self._start_at_end.get(block_id)
        if left is not None:
            start = left
            length += self._remove(left)
        if block_id + 1 in self._length_at_start:
            length += self._remove(block_id + 1)
        self._insert(start, length)
        self._num_free += 1

    def take(self, num_blocks: int, after: BlockId | None = None) -> list[BlockId]:
        """Remove `num_blocks` ids, starting with the run that follows `after` if it is free.

        Raises InternalError when fewer are free: the caller counts before it takes.
        """
        if num_blocks > self._num_free:
            raise InternalError(f"{num_blocks} blocks wanted, {self._num_free} are free")
        taken: list[BlockId] = []
        if after is not None and after + 1 in self._length_at_start:
            self._take_from(after + 1, num_blocks, taken)
        while len(taken) < num_blocks:
            wanted = num_blocks - len(taken)
            self._take_from(self._pick(wanted), wanted, taken)
        return taken

    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of every run in order of ids, for checks."""
        return sorted(self._length_at_start.items())

    def _pick(self, wanted: int) -> int:
        """The start of a run to take `wanted` ids from."""
        fitting = self._class_mask >> (wanted - 1).bit_length() << (wanted - 1).bit_length()
        mask = fitting & -fitting if fitting else self._class_mask
        start, _ = self._classes[mask.bit_length() - 1].popitem()
        self._classes[mask.bit_length() - 1][start] = None
        return start

    def _take_from(self, start: int, wanted: int, taken: list[BlockId]) -> None:
        length = self._remove(start)
        used = min(length, wanted)
        taken.extend(map(BlockId, range(start, start + used)))
        if used < length:
            self._insert(start + used, length - used)
        self._num_free -= used

    def _insert(self, start: int, length: int) -> None:
        size_class = length.bit_length() - 1
        self._length_at_start[start] = length
        self._start_at_end[start + length] = start
        self._classes[size_class][start] = None
        self._class_mask |= 1 << size_class

    def _remove(self, start: int) -> int:
        length = self._length_at_start.pop(start)
        del self._start_at_end[start + length]
        size_class = length.bit_length() - 1
        starts = self._classes[size_class]
        del starts[start]
        if not starts:
            self._class_mask &= ~(1 << size_class)
        return length
