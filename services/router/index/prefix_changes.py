"""Changes on their way into the prefix table, gathered into batches of like size, in order.

Does not know: what they do to the table, when they are applied.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.core.block import HASH_BYTES

BATCH_HASHES = 1024
"""Bounds how long applying one batch takes: well below half a millisecond."""
TOUCH = -1
NOTHING = 0


class SlotChange(Enum):
    """What happens to a whole worker."""

    CLEAR = "clear"
    """It holds nothing."""
    RELEASE = "release"
    """Its slot may be given to another one."""


class Batch(NamedTuple):
    """What `PrefixTable.apply` takes."""

    data: bytes
    """Joined hashes."""
    slots: NDArray[np.int64]
    states: NDArray[np.int64]
    ages: NDArray[np.int64]


class PendingChanges:
    """A queue of batches and of changes to whole workers."""

    def __init__(self) -> None:
        self.num_pending = 0
        """Hashes, and changes of whole workers."""
        self._ready: deque[tuple[list[tuple[int, int]], list[bytes]] | tuple[SlotChange, int]]
        self._ready = deque()
        self._codes: list[tuple[int, int]] = []
        """(slot, state) of each in `_data`."""
        self._data: list[bytes] = []
        self._num_open = 0

    def add(self, slot: int, state: int, data: bytes) -> None:
        """Joined hashes get a state, 3 device to 1 disk, NOTHING or TOUCH, on a worker.

        Raises ValueError for what is no whole number of hashes.
        """
        num_hashes, rest = divmod(len(data), HASH_BYTES)
        if rest:
            raise ValueError(f"{len(data)} bytes are no whole number of {HASH_BYTES}-byte hashes")
        if num_hashes > BATCH_HASHES:
            # From its end: the first blocks of a chain are to be the most recently used.
            size = BATCH_HASHES * HASH_BYTES
            for start in reversed(range(0, len(data), size)):
                self.add(slot, state, data[start : start + size])
        elif num_hashes:
            self._codes.append((slot, state))
            self._data.append(data)
            self.num_pending += num_hashes
            self._num_open += num_hashes
            if self._num_open >= BATCH_HASHES:
                self._close()

    def add_slot(self, change: SlotChange, slot: int) -> None:
        self._close()
        self._ready.append((change, slot))
        self.num_pending += 1

    def take(self) -> Batch | tuple[SlotChange, int] | None:
        """The earliest; None when there is nothing."""
        if not self._ready:
            self._close()
            if not self._ready:
                return None
        first, second = self._ready.popleft()
        if isinstance(first, SlotChange):
            self.num_pending -= 1
            assert isinstance(second, int)
            return first, second
        assert isinstance(second, list)
        batch = _batch(first, second)
        self.num_pending -= len(batch.ages)
        return batch

    def _close(self) -> None:
        if self._data:
            self._ready.append((self._codes, self._data))
            self._codes, self._data, self._num_open = [], [], 0


def _batch(codes: list[tuple[int, int]], data: list[bytes]) -> Batch:
    lengths = np.fromiter(map(len, data), np.int64, len(data)) // HASH_BYTES
    ends = np.cumsum(lengths)
    slots, states = np.array(codes, np.int64).T
    # Within one change the first block is the most recent: it outlives those after it.
    ages = np.repeat(2 * ends - lengths - 1, lengths) - np.arange(ends[-1])
    return Batch(b"".join(data), np.repeat(slots, lengths), np.repeat(states, lengths), ages)
