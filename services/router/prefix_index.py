"""Which worker holds which KV blocks, as far as the workers have told this router.

    block hash -> bit mask of workers          (least recently used first, bounded)
    worker     -> set of its block hashes      (so a lost worker leaves in O(its entries))

Fed by a snapshot per session and by numbered increments after it; the session finds gaps in the
numbers and asks for a new snapshot.

A match is the longest run of blocks from the start of the prompt that a worker holds. Hashes are
chained, yet presence is not prefix-closed: a worker may evict a block in the middle of a chain and
keep its successors, and the bound here may drop one as well. Searching the raw presence by halves
would jump over such holes. The running AND of the masks over the chain *is* prefix-closed, so
that is built once for all workers (one dictionary look-up a block, ending at the first block
nobody holds) and each worker's length is found in it by halves.

Does not know: prompts, token counts, load.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat, takewhile
from operator import and_

from baton.core.block import BlockHash
from baton.core.worker_info import WorkerId


class PrefixIndex:
    """Holds at most `max_entries` distinct hashes; the least recently used one goes first."""

    def __init__(self, max_entries: int) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, got {max_entries}")
        self._max_entries = max_entries
        self._masks: OrderedDict[BlockHash, int] = OrderedDict()
        self._held: dict[WorkerId, set[BlockHash]] = {}
        self._bit: dict[WorkerId, int] = {}
        self._worker_of_bit: dict[int, WorkerId] = {}

    def __len__(self) -> int:
        """Distinct hashes."""
        return len(self._masks)

    def num_blocks(self, worker_id: WorkerId) -> int:
        """Blocks known to be on `worker_id`."""
        return len(self._held.get(worker_id, ()))

    def reset_worker(self, worker_id: WorkerId, hashes: Iterable[BlockHash]) -> None:
        """A session's snapshot: forget what was known of the worker and hold `hashes`."""
        self.remove_worker(worker_id)
        self.store(worker_id, hashes)

    def store(self, worker_id: WorkerId, hashes: Iterable[BlockHash]) -> None:
        """The worker can now match these blocks."""
        bit = self._bit_of(worker_id)
        held = self._held[worker_id]
        masks = self._masks
        for block_hash in hashes:
            masks[block_hash] = masks.get(block_hash, 0) | bit
            masks.move_to_end(block_hash)
            held.add(block_hash)
        while len(masks) > self._max_entries:
            self._evict_oldest()

    def remove(self, worker_id: WorkerId, hashes: Iterable[BlockHash]) -> None:
        """The worker has evicted these blocks. Unknown ones are ignored."""
        held = self._held.get(worker_id)
        if held is None:
            return
        bit = self._bit[worker_id]
        for block_hash in hashes:
            if block_hash in held:
                held.discard(block_hash)
                self._clear(block_hash, bit)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget the worker. Its bit may be given to another one."""
        held = self._held.pop(worker_id, None)
        if held is None:
            return
        bit = self._bit.pop(worker_id)
        del self._worker_of_bit[bit]
        for block_hash in held:
            self._clear(block_hash, bit)

    def match(self, hashes: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """Leading blocks of `hashes` that each worker holds; workers without any are left out."""
        get = self._masks.get
        common = list(takewhile(bool, accumulate(map(get, hashes, repeat(0)), and_)))
        if not common:
            return {}
        lengths: dict[WorkerId, int] = {}
        for worker_id, bit in self._bit.items():
            if common[0] & bit:
                lengths[worker_id] = _first_without(common, bit)
        return lengths

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Mark a prompt's blocks as just used, the first one most recently: a bounded index then
        loses the ends of chains before their beginnings."""
        masks = self._masks
        for block_hash in reversed(hashes):
            if block_hash in masks:
                masks.move_to_end(block_hash)

    def check_integrity(self) -> None:
        """Raises AssertionError when the two directions disagree."""
        assert len(self._masks) <= self._max_entries, "bound exceeded"
        assert self._held.keys() == self._bit.keys()
        assert {b: w for w, b in self._bit.items()} == self._worker_of_bit
        from_sets: dict[BlockHash, int] = {}
        for worker_id, held in self._held.items():
            for block_hash in held:
                from_sets[block_hash] = from_sets.get(block_hash, 0) | self._bit[worker_id]
        assert from_sets == dict(self._masks), "masks and sets disagree"

    def _bit_of(self, worker_id: WorkerId) -> int:
        bit = self._bit.get(worker_id)
        if bit is None:
            bit = 1
            while bit in self._worker_of_bit:
                bit <<= 1
            self._bit[worker_id] = bit
            self._worker_of_bit[bit] = worker_id
            self._held[worker_id] = set()
        return bit

    def _clear(self, block_hash: BlockHash, bit: int) -> None:
        mask = self._masks[block_hash] & ~bit
        if mask:
            self._masks[block_hash] = mask
        else:
            del self._masks[block_hash]

    def _evict_oldest(self) -> None:
        block_hash, mask = self._masks.popitem(last=False)
        while mask:
            bit = mask & -mask
            self._held[self._worker_of_bit[bit]].discard(block_hash)
            mask ^= bit


def _first_without(common: Sequence[int], bit: int) -> int:
    """`common` loses bits along the way and never regains one."""
    return bisect_left(common, True, key=lambda mask: not mask & bit)
