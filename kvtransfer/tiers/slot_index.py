"""Which block lies in which of a tier's equal slots: LRU order, pins, free slots. Pure.

    free ──reserve──► being written ──commit──► held (least recently used first) ──► free
                             └──────abort──────────────────────────────────────────────┘

A pinned slot is never given to another block. A block that is dropped while pinned is gone from
the index at once; its slot is free with the last pin. Not known here: memory, files, threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from baton.core.block import BlockHash
from baton.core.errors import InternalError


class Reserved(NamedTuple):
    slot: int
    evicted: BlockHash | None
    """The block that lay there."""


class SlotIndex:
    """All methods cost O(1), or O(blocks named), but for pinned blocks at the cold end."""

    def __init__(self, num_slots: int, changes: dict[BlockHash, None] | None = None) -> None:
        """`changes`: gets the hashes of blocks that come or go; shared with the tier."""
        if num_slots < 1:
            raise InternalError(f"a tier needs at least one slot, got {num_slots}")
        self.num_slots = num_slots
        self.changes = changes
        self._held: OrderedDict[BlockHash, int] = OrderedDict()
        """Least recently used first."""
        self._writing: dict[BlockHash, int] = {}
        self._pins: dict[int, int] = {}
        self._doomed: set[int] = set()
        """Pinned slots whose block was dropped."""
        self._returned: list[int] = []
        self._num_touched = 0
        """Slots from here on have never been used: low ones fill first."""

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._held

    @property
    def num_free(self) -> int:
        return self.num_slots - self._num_touched + len(self._returned)

    def reserve(self, block_hash: BlockHash) -> Reserved | None:
        """A slot to write the block to, the coldest block's when none is free.

        None: the block is here or on its way, or every slot is pinned or being written.
        """
        if block_hash in self._held or block_hash in self._writing:
            return None
        evicted = None
        if self._returned:
            slot = self._returned.pop()
        elif self._num_touched < self.num_slots:
            slot = self._num_touched
            self._num_touched += 1
        else:
            evicted = next((h for h, s in self._held.items() if s not in self._pins), None)
            if evicted is None:
                return None
            slot = self._held.pop(evicted)
            self._note(evicted)
        self._writing[block_hash] = slot
        return Reserved(slot, evicted)

    def commit(self, block_hash: BlockHash) -> None:
        """The block is in its slot: from now on it is found, as the most recently used."""
        self._held[block_hash] = self._writing.pop(block_hash)
        self._note(block_hash)

    def abort(self, block_hash: BlockHash) -> None:
        """Nothing useful is in the slot."""
        self._returned.append(self._writing.pop(block_hash))

    def pin(self, block_hash: BlockHash) -> int | None:
        """Keep the block's slot as it is until `unpin`; None when it is not here."""
        slot = self._held.get(block_hash)
        if slot is not None:
            self._pins[slot] = self._pins.get(slot, 0) + 1
        return slot

    def unpin(self, slot: int) -> None:
        left = self._pins[slot] - 1
        if left:
            self._pins[slot] = left
            return
        del self._pins[slot]
        if slot in self._doomed:
            self._doomed.discard(slot)
            self._returned.append(slot)

    def touch(self, block_hashes: Iterable[BlockHash]) -> None:
        """Make these the most recently used, the last one newest."""
        for block_hash in block_hashes:
            if block_hash in self._held:
                self._held.move_to_end(block_hash)

    def drop(self, block_hash: BlockHash) -> int | None:
        """Forget the block; its slot, or None when it is not here."""
        slot = self._held.pop(block_hash, None)
        if slot is None:
            return None
        self._note(block_hash)
        if slot in self._pins:
            self._doomed.add(slot)
        else:
            self._returned.append(slot)
        return slot

    def drop_slots(self, start: int, stop: int) -> int:
        """Forget the blocks in slots start..stop-1; how many there were. O(blocks held)."""
        lost = [h for h, slot in self._held.items() if start <= slot < stop]
        for block_hash in lost:
            self.drop(block_hash)
        return len(lost)

    def adopt(self, found: Iterable[tuple[BlockHash, int]]) -> None:
        """Start with blocks found in slots, coldest first. On a new index only; slots differ."""
        for block_hash, slot in found:
            self._held[block_hash] = slot
            self._note(block_hash)
        used = set(self._held.values())
        self._num_touched = max(used, default=-1) + 1
        self._returned = [s for s in range(self._num_touched - 1, -1, -1) if s not in used]

    def hashes(self) -> list[BlockHash]:
        """Of all blocks held."""
        return list(self._held)

    def coldest(self, num_blocks: int) -> list[BlockHash]:
        return list(islice(self._held, max(0, num_blocks)))

    def hottest_first(self) -> list[BlockHash]:
        return list(reversed(self._held))

    def check_integrity(self) -> None:
        """Raises InternalError naming the first broken law. O(slots used)."""
        places = [*self._held.values(), *self._writing.values(), *self._returned, *self._doomed]
        laws = {
            "no slot has two places": len(places) == len(set(places)),
            "every touched slot has a place": set(places) == set(range(self._num_touched)),
            "slots are within the tier": self._num_touched <= self.num_slots,
            "only held or doomed slots are pinned": self._pins.keys()
            <= {*self._held.values(), *self._doomed},
            "doomed slots are pinned": self._doomed <= self._pins.keys(),
        }
        for law, holds in laws.items():
            if not holds:
                raise InternalError(f"tier index broke a law: {law}")

    def watch(self) -> None:
        """Keep note of blocks that come or go, for `take_changes`."""
        self.changes = {}

    def take_changes(self, max_blocks: int) -> list[BlockHash]:
        """Blocks that came or went since they were last taken, the earliest first."""
        changes = self.changes or {}
        taken = list(islice(changes, max_blocks))
        for block_hash in taken:
            del changes[block_hash]
        return taken

    def _note(self, block_hash: BlockHash) -> None:
        if self.changes is not None:
            self.changes[block_hash] = None

    @property
    def is_quiet(self) -> bool:
        """Nothing is pinned or being written."""
        return not (self._pins or self._writing)
