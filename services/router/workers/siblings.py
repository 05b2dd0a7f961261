"""Placements told to the other copies of this router, and theirs taken in.

Workers report their load and their KV events to every router, so copies agree on all but the last
moments: what a sibling has just sent is neither in a report nor in an event yet. A note fills that
gap, as a router's own book does for what it sends itself.

Does not know: where notes travel, how placement uses them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from baton.core.block import Hashes, join_hashes
from baton.core.worker_info import WorkerId
from services.router.placement.load_book import UNREPORTED_S
from services.router.placement.placement import Placement
from services.router.placement.worker_table import WorkerTable
from services.router.shared.state import PlacementNote, SharedState

NotePrefix = Callable[[bytes, WorkerId, float], None]
"""(joined hashes, worker, time): the worker will hold these blocks in a moment."""


class Siblings:
    """Used on the router's event loop."""

    def __init__(
        self,
        shared: SharedState,
        table: WorkerTable,
        *,
        note_prefix: NotePrefix,
        now: Callable[[], float],
    ) -> None:
        """`now`: the time that load books and `note_prefix` go by."""
        self._shared = shared
        self._table = table
        self._note_prefix = note_prefix
        self._now = now
        self._serial = itertools.count()
        shared.on_placement(self._heard)

    def placed(self, placement: Placement, hashes: Hashes, num_tokens: int) -> None:
        """This router has just sent a prompt of `num_tokens` with these full blocks."""
        if self._shared.status().num_copies < 2:
            return
        self._shared.publish_placement(
            PlacementNote(
                hashes=join_hashes(hashes),
                prefill_worker=placement.prefill,
                decode_worker=placement.decode,
                prefill_tokens=placement.terms_of(placement.computes_prompt).uncached,
                kv_tokens=num_tokens,
            )
        )

    def _heard(self, note: PlacementNote) -> None:
        now_s = self._now()
        computing = note.prefill_worker or note.decode_worker
        for worker_id in (note.prefill_worker, note.decode_worker):
            row = None if worker_id is None else self._table.get(worker_id)
            if row is None:
                # Not known here, or not yet.
                continue
            computes = worker_id == computing
            row.book.sent(
                f"sibling:{next(self._serial)}",
                prefill_tokens=note.prefill_tokens if computes else 0,
                kv_tokens=note.kv_tokens,
                # The worker had it before we heard of it: its next report contains it, and may be
                # the last one for a while.
                now_s=now_s - UNREPORTED_S,
                is_ours=False,
            )
            if computes:
                self._note_prefix(note.hashes, row.info.worker_id, now_s)
