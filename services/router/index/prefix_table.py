"""Block hash -> which workers hold the block in which tier: a fixed hash table over flat memory.

    tags    uint32 [num_buckets, 16]        32 bits of the hash, 0: free; one bucket a cache line
    rows    uint64 [num_places, words, 2]   per worker one bit in each of two words
    stamps  uint32 [num_places]             when last used; FREE where the place is free

The two bits of a worker are (1, 1) device, (1, 0) host, (0, 1) disk, (0, 0) nothing. A block may
lie in either of two buckets and goes to the emptier one, so that at LOAD of the places hardly any
bucket ever is full; where both are, the older block goes. Nothing is ever rehashed or moved, and
memory is taken once.

Writing is for batches, in numpy; reading a single block is plain Python on the same memory, since
calls into numpy would cost several times the work. Another block with the same tag and bucket is
taken for the same one: once in about 2 * 10^8 look-ups.

Does not know: worker ids, sequences of hashes, when to apply what.
"""

from __future__ import annotations

import mmap
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from baton.core.block import HASH_BYTES

MAX_ENTRIES = 1 << 27
BUCKET_PLACES = 16
BUCKET_BYTES = 4 * BUCKET_PLACES
LOAD = 0.78
"""Entries per place at the bound. A bucket pair is full then for about one insert in 10^5."""
FREE = np.uint32(0xFFFFFFFF)
CLOCK_LIMIT = 0xFFFF0000
SWEEP_FACTOR = 16
"""The bound evicts the oldest of this many times as many entries: close to the oldest of all."""
MIN_SWEEP_PLACES = 4096
SCAN_PLACES = 1 << 16
WORKERS_PER_WORD = 64

NO_TAG = bytes(4)
_TWO_WORDS = Struct("<QQ").unpack

Places = NDArray[np.int64]
Words = NDArray[np.uint64]


class PrefixTable:
    """Holds at most `max_entries` blocks after every `apply`."""

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self.num_buckets = -(-int(max_entries / LOAD) // BUCKET_PLACES) + 1
        self.num_places = self.num_buckets * BUCKET_PLACES
        self.num_entries = 0
        self.num_words = 1
        """64 workers each."""
        self._tag_bytes = mmap.mmap(-1, self.num_buckets * BUCKET_BYTES)
        self._tags = np.frombuffer(self._tag_bytes, np.uint32)
        self._find_tag = self._tag_bytes.find
        self._buckets = self._tags.reshape(-1, BUCKET_PLACES)
        self._take_rows(*self._new_rows(1))
        self._stamps = np.full(self.num_places, FREE, np.uint32)
        self._clock = 1
        self._hand = 0
        """Where the next sweep for the bound begins."""

    def widen(self, num_workers: int) -> None:
        """Make room for bits of this many workers. Copies all rows; some 10 ms per million."""
        num_words = -(-num_workers // WORKERS_PER_WORD)
        if num_words <= self.num_words:
            return
        data, rows = self._new_rows(num_words)
        rows[:, : 2 * self.num_words] = self._rows
        self.num_words = num_words
        self._take_rows(data, rows)

    def row(self, block_hash: bytes) -> bytes:
        """The block's row, empty when it is not here."""
        low, high = _TWO_WORDS(block_hash)
        tag = block_hash[:4]
        at = low % self.num_buckets * BUCKET_BYTES
        place = self._find_tag(tag, at, at + BUCKET_BYTES)
        if place < 0:
            at = high % self.num_buckets * BUCKET_BYTES
            place = self._find_tag(tag, at, at + BUCKET_BYTES)
            if place < 0:
                return b""
        if place & 3 or tag == NO_TAG:
            # Bytes of two neighbours look like the tag, or it is the mark of free places.
            return self._row_by_batch(block_hash)
        at = place * self._row_quarter
        return self._row_bytes[at : at + self.row_bytes]

    def rows(self, data: bytes) -> Words:
        """[num_hashes, 2 * num_words]: the rows of these joined hashes, zero for those not here."""
        places = self._find(*self._keys(data)[:3])
        found = self._rows[places]
        found[places < 0] = 0
        return found

    def apply(
        self, data: bytes, slots: NDArray[np.int64], states: NDArray[np.int64], ages: Places
    ) -> None:
        """Change the joined hashes' states, in order: worker slot, state, and use.

        `states`: 0 nothing, 1 disk, 2 host, 3 device; negative: only mark as used. `ages`: order of
        use among these hashes, the highest is the most recent.
        """
        tags, first, second = self._keys(data)
        places = self._find(tags, first, second)
        new = np.flatnonzero((places < 0) & (states > 0))
        stamps = self._next_stamps(ages)
        if new.size:
            places[new] = self._insert(tags[new], first[new], second[new], stamps[new])
            # Entries made here may have had to make room for later ones.
            places[(places >= 0) & (self._tags[places] != tags)] = -1
            # What is removed or touched may have been stored in the same batch.
            rest = np.flatnonzero((places < 0) & (states <= 0))
            if rest.size:
                places[rest] = self._find(tags[rest], first[rest], second[rest])
        used = np.flatnonzero((places >= 0) & ((states == 3) | (states < 0)))
        self._stamps[places[used]] = stamps[used]
        changes = np.flatnonzero((places >= 0) & (states >= 0))
        if changes.size:
            self._change(places[changes], slots[changes], states[changes])
        self._keep_bound()

    def clear_slot(self, slot: int) -> None:
        """No block is on this worker any more."""
        word, bit = self._bit(slot)
        for start in range(0, self.num_places, SCAN_PLACES):
            part = self._rows[start : start + SCAN_PLACES, 2 * word : 2 * word + 2]
            held = np.flatnonzero((part[:, 0] | part[:, 1]) & bit)
            if held.size:
                part[held] &= ~bit
                self._drop_empty(held + start)

    def num_blocks(self, slot: int) -> int:
        """Blocks on this worker, counted over the whole table."""
        word, bit = self._bit(slot)
        held = (self._rows[:, 2 * word] | self._rows[:, 2 * word + 1]) & bit
        return int(np.count_nonzero(held))

    def check_integrity(self) -> None:
        """Raises AssertionError naming what does not add up."""
        is_used = self._tags != 0
        assert np.count_nonzero(is_used) == self.num_entries, "entries are counted wrongly"
        assert self.num_entries <= self.max_entries, "bound exceeded"
        assert np.array_equal(is_used, self._rows.any(axis=1)), "a row without a tag, or vice versa"
        assert np.array_equal(is_used, self._stamps != FREE), "a stamp without a tag, or vice versa"
        ordered = np.sort(self._buckets, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)
        assert not twice.any(), "a tag is twice in a bucket"

    # Places.

    def _keys(self, data: bytes) -> tuple[NDArray[np.uint32], Places, Places]:
        """Tags and both buckets of joined hashes."""
        words = np.frombuffer(data, "<u8").reshape(-1, HASH_BYTES // 8)
        low, high = words[:, 0], words[:, 1]
        tags = low.astype(np.uint32)
        np.maximum(tags, 1, out=tags)
        num_buckets = np.uint64(self.num_buckets)
        return tags, (low % num_buckets).view(np.int64), (high % num_buckets).view(np.int64)

    def _find(self, tags: NDArray[np.uint32], first: Places, second: Places) -> Places:
        """Where these blocks are; -1 for those that are not here."""
        return _place(_mask(self._both(first, second) == tags[:, None]), first, second)

    def _both(self, first: Places, second: Places) -> NDArray[np.uint32]:
        """[num, 32]: tags of the two buckets of each."""
        return np.concatenate((self._buckets.take(first, 0), self._buckets.take(second, 0)), axis=1)

    def _insert(
        self, tags: NDArray[np.uint32], first: Places, second: Places, stamps: NDArray[np.uint32]
    ) -> Places:
        """Find room for blocks that are not here, some of which may be the same."""
        places = np.full(len(tags), -1, np.int64)
        left = np.arange(len(tags))
        while left.size:
            t, a, b = tags[left], first[left], second[left]
            chosen = self._choose(a, b)
            self._evict(chosen[self._tags[chosen] != 0])
            # Several may have chosen one place; the last one has it, with all that are the same.
            self._tags[chosen] = t
            has_it = self._tags[chosen] == t
            won = chosen[has_it]
            places[left[has_it]] = won
            self._stamps[won] = stamps[left[has_it]]
            self.num_entries += _num_distinct(won)
            left = left[~has_it]
        return places

    def _choose(self, first: Places, second: Places) -> Places:
        """A free place in the emptier bucket, or the place of the oldest block in both."""
        free = _mask(self._both(first, second) == 0)
        low, high = free & np.uint32(0xFFFF), free >> np.uint32(16)
        takes_second = np.bitwise_count(high) > np.bitwise_count(low)
        mask = np.where(takes_second, high, low)
        bucket = np.where(takes_second, second, first)
        chosen = bucket * BUCKET_PLACES + np.bitwise_count((mask & -mask) - np.uint32(1))
        full = np.flatnonzero(mask == 0)
        if full.size:
            stamps = self._stamps.reshape(-1, BUCKET_PLACES)
            both = np.concatenate((stamps[first[full]], stamps[second[full]]), 1)
            oldest = both.argmin(axis=1)
            bucket = np.where(oldest < BUCKET_PLACES, first[full], second[full])
            chosen[full] = bucket * BUCKET_PLACES + oldest % BUCKET_PLACES
        return chosen

    # Entries.

    def _change(self, places: Places, slots: NDArray[np.int64], states: NDArray[np.int64]) -> None:
        """Set states; of several changes of one block on one worker the last counts."""
        num = len(places)
        order = np.sort(((places << 12 | slots) << 24) | np.arange(num))
        is_last = np.empty(num, bool)
        is_last[-1] = True
        np.not_equal(order[1:] >> 24, order[:-1] >> 24, out=is_last[:-1])
        last = order[is_last] & 0xFFFFFF
        places, slots, states = places[last], slots[last], states[last].astype(np.uint64)
        width = 2 * self.num_words
        at = places * width + (slots >> 6) * 2
        shift = (slots & 63).astype(np.uint64)
        flat = self._rows.reshape(-1)
        one = np.uint64(1)
        for offset, new in ((0, states >> one), (1, states & one)):
            # Each adds or takes its own bit alone, so sums of them never carry.
            old = (flat[at + offset] >> shift) & one
            np.add.at(flat, at + offset, (new - old) << shift)
        gone = places[states == 0]
        if gone.size:
            self._drop_empty(gone)

    def _drop_empty(self, places: Places) -> None:
        """Free those of `places` that nobody holds any more."""
        empty = places[~self._rows[places].any(axis=1)]
        self._free(empty[self._tags[empty] != 0])

    def _evict(self, places: Places) -> None:
        self._rows[places] = 0
        self._free(places)

    def _free(self, places: Places) -> None:
        """`places` are in use; some may be named twice."""
        if places.size:
            self._tags[places] = 0
            self._stamps[places] = FREE
            self.num_entries -= _num_distinct(places)

    def _keep_bound(self) -> None:
        """Evict what is over the bound: the oldest of a part of the table, each time the next."""
        while (over := self.num_entries - self.max_entries) > 0:
            size = max(MIN_SWEEP_PLACES, int(over * SWEEP_FACTOR / LOAD))
            start = self._hand if size < self.num_places else 0
            part = self._stamps[start : start + size]
            self._hand = start + size if start + size < self.num_places else 0
            num_used = int(np.count_nonzero(part != FREE))
            num_evicted = over if size >= self.num_places else min(over, num_used // 8)
            if num_evicted:
                self._evict(np.argpartition(part, num_evicted)[:num_evicted] + start)

    def _next_stamps(self, ages: Places) -> NDArray[np.uint32]:
        num = len(ages)
        if self._clock + num >= CLOCK_LIMIT:
            # All of the older half become equally old.
            half = np.uint32(self._clock // 2)
            is_free = self._stamps == FREE
            self._stamps = np.maximum(self._stamps, half) - half
            self._stamps[is_free] = FREE
            self._clock -= int(half)
        stamps = (ages + self._clock).astype(np.uint32)
        self._clock += num
        return stamps

    def _row_by_batch(self, block_hash: bytes) -> bytes:
        row = self.rows(block_hash)
        return row.tobytes() if row.any() else b""

    def _bit(self, slot: int) -> tuple[int, np.uint64]:
        word, bit = divmod(slot, WORKERS_PER_WORD)
        return word, np.uint64(1 << bit)

    def _take_rows(self, data: mmap.mmap, rows: Words) -> None:
        self._row_bytes, self._rows = data, rows
        self.row_bytes = 16 * self.num_words
        self._row_quarter = self.row_bytes // 4

    def _new_rows(self, num_words: int) -> tuple[mmap.mmap, Words]:
        data = mmap.mmap(-1, self.num_places * 16 * num_words)
        return data, np.frombuffer(data, np.uint64).reshape(self.num_places, 2 * num_words)


def _mask(is_there: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """[num, 32] truths as 32 bits each, the first the lowest."""
    return np.packbits(is_there.reshape(-1), bitorder="little").view(np.uint32)


def _place(mask: NDArray[np.uint32], first: Places, second: Places) -> Places:
    """The place that the lowest bit names; -1 for none."""
    number = np.bitwise_count((mask & -mask) - np.uint32(1)).astype(np.int64)
    bucket = np.where(number < BUCKET_PLACES, first, second)
    places: Places = bucket * BUCKET_PLACES + (number & (BUCKET_PLACES - 1))
    places[mask == 0] = -1
    return places


def _num_distinct(places: Places) -> int:
    if places.size < 2:
        return places.size
    ordered = np.sort(places)
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))
