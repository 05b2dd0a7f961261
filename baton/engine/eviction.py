"""In which order cached blocks are evicted, and which of them no tier has saved yet.

    evicted first  ◄── cold ── 7 4 9 2 ── warm ──►  just released        all CACHED blocks
                               7   9                                     those not saved

Both rows keep the same order. A block that was taken to be saved comes back to the place it had;
every other one comes back warm.

Not known here: hashes, holders, leases.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from baton.core.block import BlockId

_Row = list[tuple[int, BlockId]]
"""A heap of (age, block). Entries of blocks that have left or moved stay until they come up."""


class EvictionOrder:
    """The CACHED blocks of a pool. Each call costs O(log blocks) for each block named."""

    def __init__(self) -> None:
        self._is_saved: dict[BlockId, bool] = {}
        """Of the blocks that are here."""
        self._ages: dict[BlockId, int] = {}
        """Lower is colder. Kept when a block leaves, for those that come back to their place."""
        self._newest = 0
        self._order: _Row = []
        self._unsaved: _Row = []
        self._num_unsaved = 0

    def __len__(self) -> int:
        return len(self._is_saved)

    @property
    def num_unsaved(self) -> int:
        return self._num_unsaved

    def add(self, block_id: BlockId, *, is_saved: bool, is_cold: bool) -> None:
        """To the warm end, or (`is_cold`) to the place it had when it left."""
        if not is_cold or block_id not in self._ages:
            self._newest += 1
            self._ages[block_id] = self._newest
        self._is_saved[block_id] = is_saved
        entry = (self._ages[block_id], block_id)
        heapq.heappush(self._order, entry)
        if not is_saved:
            self._num_unsaved += 1
            heapq.heappush(self._unsaved, entry)
        self._order = self._tidied(self._order)
        self._unsaved = self._tidied(self._unsaved)

    def discard(self, block_id: BlockId) -> None:
        """The block is no longer CACHED."""
        self._num_unsaved -= not self._is_saved.pop(block_id)

    def coldest(self) -> BlockId:
        while not self._is_here(self._order[0]):
            heapq.heappop(self._order)
        return self._order[0][1]

    def coldest_unsaved(self) -> BlockId:
        while not self._is_here(self._unsaved[0]) or self._is_saved[self._unsaved[0][1]]:
            heapq.heappop(self._unsaved)
        return self._unsaved[0][1]

    def has_laws(self, cached: Iterable[BlockId], unsaved: Iterable[BlockId]) -> bool:
        """True when the rows hold exactly these blocks, and both are heaps of them. O(blocks)."""
        wanted = {block_id for block_id, is_saved in self._is_saved.items() if not is_saved}
        return (
            set(cached) == self._is_saved.keys()
            and set(unsaved) == wanted
            and self._num_unsaved == len(wanted)
            and {b for age, b in self._order if self._is_here((age, b))} == self._is_saved.keys()
            and {b for age, b in self._unsaved if self._is_here((age, b))} >= wanted
        )

    def _is_here(self, entry: tuple[int, BlockId]) -> bool:
        age, block_id = entry
        return block_id in self._is_saved and self._ages[block_id] == age

    def _tidied(self, row: _Row) -> _Row:
        """The row without entries that mean nothing, once they are the greater part of it."""
        if len(row) < 64 + 2 * len(self._is_saved):
            return row
        # A block that left and came back to its place is there twice.
        kept = list({entry for entry in row if self._is_here(entry)})
        heapq.heapify(kept)
        return kept
