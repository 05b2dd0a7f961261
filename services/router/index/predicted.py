"""Prefixes that workers will hold in a moment, because they have just been sent the prompt.

Until a worker's first KV event of a prompt arrives, its siblings (several answers to one prompt,
questions to one document) would be placed as if nobody had it. A placement is noted here for a
few seconds. It is found by its hashes at depths 1, 2, 4, 8 ...: few entries per placement, few
look-ups per match. Hashes are chained, so how much two prompts have in common is found by halves.

    hash at depth 1, 2, 4 ... ─► last placements whose prompt runs through it ─► common length

Bounded by placements and by blocks; the oldest go first. The caller passes the time. Does not
know: what really came of a placement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from baton.core.block import HASH_BYTES, BlockHash, Hashes, join_hashes
from baton.core.tier import Tier
from baton.core.worker_info import WorkerId
from services.router.index.prefix_match import PrefixMatch

MAX_NOTES = 20_000
MAX_BLOCKS = 1 << 20
"""Of all noted prompts, 16 bytes each."""
MAX_PER_KEY = 8
"""Placements remembered per prefix, the last ones."""


class _Note(NamedTuple):
    worker_id: WorkerId
    hashes: bytes
    """Joined."""
    expires_at_s: float


class PredictedPrefixes:
    """Placements of the last `ttl_s` seconds."""

    def __init__(
        self, ttl_s: float = 5.0, *, max_notes: int = MAX_NOTES, max_blocks: int = MAX_BLOCKS
    ) -> None:
        if ttl_s <= 0:
            raise ValueError(f"ttl_s must be positive, got {ttl_s}")
        self._ttl_s = ttl_s
        self._max_notes = max_notes
        self._max_bytes = max_blocks * HASH_BYTES
        self._notes: deque[_Note] = deque()
        self._num_bytes = 0
        self._by_key: dict[bytes, deque[_Note]] = {}

    def __len__(self) -> int:
        """Placements remembered."""
        return len(self._notes)

    def note(self, hashes: Hashes, worker_id: WorkerId, now_s: float) -> None:
        """The worker has been sent a prompt of these blocks. Time does not run backwards."""
        joined = join_hashes(hashes)
        self._expire(now_s)
        if not joined or len(joined) > self._max_bytes:
            return
        note = _Note(worker_id, joined, now_s + self._ttl_s)
        self._notes.append(note)
        self._num_bytes += len(joined)
        for key in _keys(joined):
            notes = self._by_key.get(key)
            if notes is None:
                notes = self._by_key[key] = deque(maxlen=MAX_PER_KEY)
            notes.append(note)
        while len(self._notes) > self._max_notes or self._num_bytes > self._max_bytes:
            self._drop_oldest()

    def merge(self, match: PrefixMatch, hashes: Sequence[BlockHash], now_s: float) -> PrefixMatch:
        """`match` with the lengths of workers raised that were just sent the same prefix."""
        self._expire(now_s)
        raised = self._longer(match, hashes)
        if not raised:
            return match
        lengths = match.lengths.copy()
        for slot, length in raised.items():
            for tier in Tier:
                if lengths.item(tier, slot) < length:
                    lengths[tier, slot] = length
        return PrefixMatch(lengths, match.slots)

    def check_integrity(self) -> None:
        """Raises AssertionError naming what does not add up."""
        assert self._num_bytes == sum(len(n.hashes) for n in self._notes), "bytes are miscounted"
        assert self._num_bytes <= self._max_bytes and len(self._notes) <= self._max_notes
        live = {id(note) for note in self._notes}
        for key, notes in self._by_key.items():
            assert notes, "a key without a placement"
            for note in notes:
                assert id(note) in live, "a placement outlives its time"
                assert key in _keys(note.hashes), "a placement under a key of another"

    def _longer(self, match: PrefixMatch, hashes: Sequence[BlockHash]) -> dict[int, int]:
        """Leading blocks that workers will hold, by slot, where that is more than `match` knows;
        deep prefixes tell of at least as much."""
        found: list[tuple[int, deque[_Note]]] = []
        depth = 1
        while depth <= len(hashes) and (notes := self._by_key.get(hashes[depth - 1])):
            found.append((depth, notes))
            depth *= 2
        # No row is below the first.
        on_device, slots = match.lengths[Tier.DEVICE], match.slots
        raised: dict[int, int] = {}
        above: deque[_Note] = deque()
        guess = 0
        for depth, notes in reversed(found):
            if above and len(notes) == len(above) and notes[0] is above[0]:
                # All that is remembered of this prefix runs on to the deeper one.
                continue
            above = notes
            for note in notes:
                slot = slots.get(note.worker_id)
                if slot is None:
                    continue
                known = raised.get(slot) or on_device.item(slot)
                if known < depth:
                    known = depth
                elif _has(note.hashes, hashes, known):
                    known += 1
                else:
                    # Mostly a worker holds all that it shares with the prompt.
                    continue
                # Mostly what prompts have in common ends at the same depth.
                guess = raised[slot] = _common(note.hashes, hashes, known, guess)
        return raised

    def _expire(self, now_s: float) -> None:
        while self._notes and self._notes[0].expires_at_s <= now_s:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        note = self._notes.popleft()
        self._num_bytes -= len(note.hashes)
        for key in _keys(note.hashes):
            notes = self._by_key.get(key)
            # Newer ones of the same prefix may have pushed it out already.
            if notes and notes[0] is note:
                notes.popleft()
                if not notes:
                    del self._by_key[key]


def _keys(joined: bytes) -> Iterator[bytes]:
    """The hashes at depths 1, 2, 4 ..."""
    end = HASH_BYTES
    while end <= len(joined):
        yield joined[end - HASH_BYTES : end]
        end *= 2


def _has(noted: bytes, hashes: Sequence[BlockHash], depth: int) -> bool:
    """Whether the block after the first `depth` ones is the same too."""
    return depth < len(hashes) and noted.startswith(hashes[depth], depth * HASH_BYTES)


def _common(noted: bytes, hashes: Sequence[BlockHash], known: int, guess: int) -> int:
    """Common leading blocks, of which there are at least `known`."""
    low, high = known, min(len(noted) // HASH_BYTES, len(hashes))
    if noted.startswith(hashes[high - 1], (high - 1) * HASH_BYTES):
        return high
    # Blocks up to `low` are common, block `high` is not.
    middle = guess if low <= guess < high else (low + high) // 2
    while high - low > 1:
        if noted.startswith(hashes[middle - 1], (middle - 1) * HASH_BYTES):
            low = middle
            middle = middle + 1 if middle == guess else (low + high) // 2
        else:
            high = middle
            middle = (low + high) // 2
    return low
