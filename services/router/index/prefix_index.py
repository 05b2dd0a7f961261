"""Which worker holds which KV blocks in which tier, as far as the workers have told this router.

    store, remove, touch, reset_worker ─► changes waiting, in order ─► flush ─► PrefixTable ─► match

Changes are gathered and applied many at a time, because a call into numpy costs about as much for
one block as for a hundred. Hence a match sees what was flushed: with `max_pending` 0 it flushes
itself, else whoever owns the index calls `flush` every few milliseconds.

A match is the longest run of blocks from the start of the prompt that a worker holds. Hashes are
chained, and a worker evicts the end of a chain before its beginning, so who holds a block mostly
holds those before it: the few depths at which the holders change are found by halves, and no
block between two equal ones is looked at. Where presence has a hole (the bound here, or a worker,
dropped a block in the middle of a chain) the length may come out too long. It is a prediction; the
worker says what it really had. `match_exactly` looks at every block.

Does not know: prompts, token counts, load, time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from baton.core.block import BlockHash, Hashes, join_hashes
from baton.core.tier import Tier
from baton.core.worker_info import WorkerId
from services.router.index.prefix_changes import (
    BATCH_HASHES,
    NOTHING,
    TOUCH,
    Batch,
    PendingChanges,
    SlotChange,
)
from services.router.index.prefix_match import NUM_TIERS, PrefixMatch
from services.router.index.prefix_table import MAX_ENTRIES, WORKERS_PER_WORD, PrefixTable

MAX_SLOTS = 4096
MAX_PROBES = 96
"""A match that needs more looks at all blocks instead, which costs about as much."""
MAX_MASKS_BYTES = 4 << 20
MAX_MASKS_ROWS = 16
MAX_RUN_ENDS = 1 << 15
"""Beyond this all are forgotten; a few MiB."""


class PrefixIndex:
    """Holds at most `max_entries` distinct hashes; the least recently used ones go first.

    Hashes must be evenly spread, as digests are.
    """

    def __init__(self, max_entries: int, *, max_pending: int = 0) -> None:
        """`max_pending`: hashes that may wait for a `flush`; 0: every match flushes first."""
        if not 1 <= max_entries <= MAX_ENTRIES:
            raise ValueError(f"max_entries must be in 1..{MAX_ENTRIES}, got {max_entries}")
        self._table = PrefixTable(max_entries)
        self._max_pending = max_pending
        self._max_waiting = max(max_pending, BATCH_HASHES)
        self._changes = PendingChanges()
        self._slots: dict[WorkerId, int] = {}
        self._next_slot = 0
        self._free_slots: list[int] = []
        self._used: set[int] = set()
        """Slots that may have blocks."""
        self._masks: dict[bytes, NDArray[np.float32]] = {}
        self._masks_bytes = 0
        self._run_ends: dict[BlockHash, int] = {}
        """Where the blocks that the same workers hold ended when last looked at, by their first
        one. Prompts with the same system's prompt part there, turns of a conversation go on."""
        self._nothing = self._no_lengths()

    def __len__(self) -> int:
        """Distinct hashes, as of the last flush."""
        return self._table.num_entries

    @property
    def num_slots(self) -> int:
        """Columns of a match: at least one per worker, grows by 64."""
        return self._table.num_words * WORKERS_PER_WORD

    @property
    def num_pending(self) -> int:
        """Changes that wait to be applied, most of them one hash each."""
        return self._changes.num_pending

    @property
    def num_bytes(self) -> int:
        """Memory of the table."""
        return self._table.num_places * (8 + self._table.row_bytes)

    def slot_of(self, worker_id: WorkerId) -> int:
        """The worker's column in a match; its own until `remove_worker`.

        Raises ValueError beyond MAX_SLOTS workers.
        """
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self._slots[worker_id] = self._take_slot()
        return slot

    def num_blocks(self, worker_id: WorkerId) -> int:
        """Blocks known to be on `worker_id`. Looks at the whole table."""
        slot = self._slots.get(worker_id)
        return 0 if slot is None else self._table.num_blocks(slot)

    def reset_worker(self, worker_id: WorkerId, held: Mapping[Tier, Hashes]) -> None:
        """A session's snapshot: forget what was known of the worker and hold `held`, where each
        block is named once, under its best tier."""
        slot = self.slot_of(worker_id)
        if slot in self._used:
            self._used.discard(slot)
            self._add_slot(SlotChange.CLEAR, slot)
        for tier, hashes in held.items():
            self.store(worker_id, hashes, tier)

    def store(self, worker_id: WorkerId, hashes: Hashes, tier: Tier = Tier.DEVICE) -> None:
        """The worker's best copy of these blocks is now in `tier`."""
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self.slot_of(worker_id)
        self._used.add(slot)
        self._add(slot, NUM_TIERS - tier, join_hashes(hashes))

    def remove(self, worker_id: WorkerId, hashes: Hashes) -> None:
        """The worker has these blocks in no tier any more. Unknown ones are ignored."""
        slot = self._slots.get(worker_id)
        if slot in self._used:
            self._add(slot, NOTHING, join_hashes(hashes))

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget the worker; its slot goes to the next new one."""
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            self._used.discard(slot)
            self._add_slot(SlotChange.CLEAR, slot)
            self._add_slot(SlotChange.RELEASE, slot)

    def touch(self, hashes: Hashes) -> None:
        """Mark a prompt's blocks as just used, the first one most recently: a bounded index then
        loses the ends of chains before their beginnings."""
        self._add(0, TOUCH, join_hashes(hashes))

    def flush(self, max_hashes: int | None = None) -> None:
        """Apply what waits, in order: all of it, or about `max_hashes`."""
        until = 0 if max_hashes is None else self.num_pending - max_hashes
        while self.num_pending > max(0, until):
            self._apply_some()

    def match(self, hashes: Sequence[BlockHash]) -> PrefixMatch:
        """Leading blocks of `hashes` that each worker holds, in each tier or a better one."""
        if self._changes.num_pending and not self._max_pending:
            self.flush()
        row = self._table.row(hashes[0]) if hashes else b""
        if not row:
            return PrefixMatch(self._nothing, self._slots)
        ends, rows = self._runs_by_halves(hashes, row) or self._runs(join_hashes(hashes))
        self._note_run_ends(hashes, ends)
        return PrefixMatch(self._lengths(ends, rows), self._slots)

    def match_exactly(self, hashes: Sequence[BlockHash]) -> PrefixMatch:
        """`match` without its assumption: every block is looked at."""
        if self._changes.num_pending and not self._max_pending:
            self.flush()
        ends, rows = self._runs(join_hashes(hashes))
        if not rows.strip(b"\0"):
            return PrefixMatch(self._nothing, self._slots)
        return PrefixMatch(self._lengths(ends, rows), self._slots)

    def check_integrity(self) -> None:
        """Flushes. Raises AssertionError naming what does not add up."""
        self.flush()
        assert not self.num_pending
        taken = [*self._slots.values(), *self._free_slots]
        assert sorted(taken) == list(range(self._next_slot)), "a slot is lost or given twice"
        assert self._used <= set(self._slots.values()), "blocks on a slot that is nobody's"
        for slot in range(self.num_slots):
            assert slot in self._used or not self._table.num_blocks(slot), "blocks of nobody"
        self._table.check_integrity()

    def _runs_by_halves(
        self, hashes: Sequence[BlockHash], row: bytes
    ) -> tuple[list[int], bytes] | None:
        """Where runs of equal rows end, and these rows joined, but for blocks that nobody holds
        at the end. `row`: of the first block, not empty. None beyond MAX_PROBES."""
        row_of = self._table.row
        # Depths with what is held there, deepest first; `low` has `row`.
        probes = [(len(hashes) - 1, row_of(hashes[-1]))]
        ends: list[int] = []
        rows: list[bytes] = []
        low, num_probes = 0, 2
        hints = self._hints(hashes[0])
        while probes:
            high, other = probes[-1]
            if other == row:
                low = high
                probes.pop()
            elif high - low > 1:
                num_probes += 1
                if num_probes > MAX_PROBES:
                    return None
                middle = (low + high) // 2
                if hints and low < hints[-1] < high:
                    middle = hints.pop()
                probes.append((middle, row_of(hashes[middle])))
            else:
                ends.append(high)
                rows.append(row)
                low, row = high, other
                probes.pop()
                if not row:
                    break
                hints = self._hints(hashes[low])
        if row:
            ends.append(len(hashes))
            rows.append(row)
        return ends, b"".join(rows)

    def _runs(self, data: bytes) -> tuple[list[int], bytes]:
        """The same by looking at every block, those that nobody holds included."""
        rows = self._table.rows(data)
        if not rows.size:
            return [], b""
        changes = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1))
        starts = np.concatenate(([0], changes + 1))
        return [*(changes + 1).tolist(), len(rows)], rows[starts].tobytes()

    def _hints(self, first: BlockHash) -> list[int]:
        """Depths at which to look for the end of the run that begins with this block, the last one
        first: right behind where it was, then right before."""
        end = self._run_ends.get(first, 0)
        return [end - 1, end]

    def _note_run_ends(self, hashes: Sequence[BlockHash], ends: list[int]) -> None:
        if len(self._run_ends) > MAX_RUN_ENDS:
            self._run_ends.clear()
        start = 0
        for end in ends:
            self._run_ends[hashes[start]] = end
            start = end

    def _lengths(self, ends: list[int], rows: bytes) -> NDArray[np.int32]:
        """[num_tiers, num_slots] from joined rows that are held up to `ends`, by depth."""
        masks = self._masks.get(rows)
        if masks is None:
            masks = self._common_masks(rows, len(ends))
        # In float32, which is exact here and has the fastest product.
        parts = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        lengths: NDArray[np.int32] = np.array(parts, np.float32).dot(masks).astype(np.int32)
        return lengths.reshape(NUM_TIERS, -1)

    def _common_masks(self, rows: bytes, num_rows: int) -> NDArray[np.float32]:
        """[num_rows, num_tiers * num_slots]: 1 for who holds this row and those before it.

        Remembered: there are few different sets of workers at one time.
        """
        bits = np.unpackbits(np.frombuffer(rows, np.uint8), bitorder="little")
        pairs = bits.reshape(num_rows, -1, 2, WORKERS_PER_WORD)
        high, low = pairs[:, :, 0], pairs[:, :, 1]
        tiers = [tier.reshape(num_rows, -1) for tier in (high & low, high, high | low)]
        common = np.bitwise_and.accumulate(np.concatenate(tiers, axis=1), axis=0)
        masks = common.astype(np.float32)
        if num_rows <= MAX_MASKS_ROWS:
            if self._masks_bytes > MAX_MASKS_BYTES:
                self._forget_masks()
            self._masks[rows] = masks
            self._masks_bytes += masks.nbytes + len(rows)
        return masks

    def _forget_masks(self) -> None:
        self._masks.clear()
        self._masks_bytes = 0

    def _add(self, slot: int, state: int, data: bytes) -> None:
        self._changes.add(slot, state, data)
        if self._changes.num_pending > self._max_waiting:
            self._apply_some()

    def _add_slot(self, change: SlotChange, slot: int) -> None:
        self._changes.add_slot(change, slot)
        if self._changes.num_pending > self._max_waiting:
            self._apply_some()

    def _apply_some(self) -> bool:
        """The batch or the change that has waited longest; False when there is none."""
        taken = self._changes.take()
        if taken is None:
            return False
        if isinstance(taken, Batch):
            self._table.apply(*taken)
            return True
        change, slot = taken
        if change is SlotChange.CLEAR:
            self._table.clear_slot(slot)
        else:
            self._free_slots.append(slot)
        return True

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        if self._next_slot >= MAX_SLOTS:
            raise ValueError(f"more than {MAX_SLOTS} workers in one prefix index")
        slot = self._next_slot
        self._next_slot += 1
        if self._next_slot > self.num_slots:
            self._table.widen(self._next_slot)
            self._forget_masks()
            self._nothing = self._no_lengths()
        return slot

    def _no_lengths(self) -> NDArray[np.int32]:
        lengths = np.zeros((NUM_TIERS, self.num_slots), np.int32)
        lengths.flags.writeable = False
        return lengths
