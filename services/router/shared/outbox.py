"""What a copy still has to tell the others, bounded: full queues drop their oldest entries.

Nothing is sent twice: what was on its way when the store failed is lost, which costs a tenant a
few tokens of this minute or a sibling a guess, while a repeated refund would grant too much.

Pure.
"""

from __future__ import annotations

from collections import deque

from baton.core.block import HASH_BYTES
from services.router.shared.state import PlacementNote
from services.router.shared.store import Refund
from services.router.shared.wire import MAX_BATCH_BYTES, MAX_NOTE_BLOCKS

MAX_REFUNDS = 20_000
MAX_NOTES = 4096
REFUNDS_PER_CALL = 256
_NOTE_BYTES = 64
"""Of a note beside its hashes, roughly."""


class RefundQueue:
    """Refunds in the order of the requests' ends."""

    def __init__(self) -> None:
        self._refunds: deque[Refund] = deque(maxlen=MAX_REFUNDS)

    def __len__(self) -> int:
        return len(self._refunds)

    def add(self, refund: Refund) -> None:
        self._refunds.append(refund)

    def next_batch(self) -> list[Refund]:
        count = min(len(self._refunds), REFUNDS_PER_CALL)
        return [self._refunds.popleft() for _ in range(count)]


class NoteQueue:
    """Placements, the oldest first."""

    def __init__(self) -> None:
        self._notes: deque[PlacementNote] = deque()

    def __len__(self) -> int:
        return len(self._notes)

    def add(self, note: PlacementNote) -> int:
        """Notes dropped to make room."""
        self._notes.append(note)
        if len(self._notes) <= MAX_NOTES:
            return 0
        self._notes.popleft()
        return 1

    def next_batch(self) -> list[PlacementNote]:
        """As many as go into one message."""
        notes: list[PlacementNote] = []
        num_bytes = 0
        while self._notes and num_bytes < MAX_BATCH_BYTES // 4:
            note = self._notes.popleft()
            num_bytes += min(len(note.hashes), MAX_NOTE_BLOCKS * HASH_BYTES) + _NOTE_BYTES
            notes.append(note)
        return notes

    def clear(self) -> int:
        """The number of notes thrown away."""
        count = len(self._notes)
        self._notes.clear()
        return count
