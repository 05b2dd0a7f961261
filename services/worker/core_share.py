"""Workers of one host share its cores: each computes with its part of those that are in use.

Two workers that both use all cores slow each other down far beyond half: every short parallel
region of one waits for a thread that the other has displaced. So each worker says in a small
shared file whether it computes, and before each step takes `cores / computing workers` threads,
at least one. A worker alone has all cores; the change costs microseconds.

The file holds one slot of two 32-bit integers a worker: process id and 1 while computing. A slot
of a dead process is free. Nothing breaks when a value is read too late: it is a hint for speed.

Not known here: engines, steps, the tensor library.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NUM_SLOTS = 64
"""Workers of one user on one set of cores; more of them share without being counted."""
LOCK_TRIES = 50
LOCK_PAUSE_S = 0.02
_SLOT_INTS = 2
_FILE_BYTES = NUM_SLOTS * _SLOT_INTS * 4


class AllCores:
    """For a worker whose thread count is set by hand: nothing is shared."""

    def adjust(self) -> None:
        """Before each step."""

    def leave(self) -> None:
        """There is nothing to compute for now."""


class CoreShare:
    """One worker's slot. All methods are called on the thread that computes."""

    def __init__(
        self, file: Path, *, num_cores: int, set_num_threads: Callable[[int], None]
    ) -> None:
        """Claims a slot in `file`, which is created when missing."""
        self._num_cores = num_cores
        self._set_num_threads = set_num_threads
        self._num_threads = 0
        self._slots, self._mine = _claim(file)

    def adjust(self) -> None:
        """Mark this worker as computing and take its share of the cores."""
        if self._mine is not None:
            self._slots[self._mine + 1] = 1
        wanted = max(1, self._num_cores // (1 + self._count_others()))
        if wanted != self._num_threads:
            self._num_threads = wanted
            self._set_num_threads(wanted)

    def leave(self) -> None:
        """Give the cores to the others until the next `adjust`."""
        if self._mine is not None:
            self._slots[self._mine + 1] = 0

    def _count_others(self) -> int:
        slots = self._slots
        return sum(
            1
            for i in range(0, NUM_SLOTS * _SLOT_INTS, _SLOT_INTS)
            if slots[i + 1] and i != self._mine and _is_alive(slots[i])
        )


def shared_file(cores: Sequence[int]) -> Path:
    """The file of all workers of this user that may run on exactly these cores."""
    digest = hashlib.sha256(",".join(map(str, sorted(cores))).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"baton-cores-{os.getuid()}-{digest}"


def _claim(file: Path) -> tuple[memoryview, int | None]:
    """The slots and the index of ours, None when all are taken."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # The lock only keeps two starting workers from taking the same slot.
        _lock(descriptor)
        if os.fstat(descriptor).st_size < _FILE_BYTES:
            os.truncate(descriptor, _FILE_BYTES)
        slots = memoryview(mmap.mmap(descriptor, _FILE_BYTES)).cast("i")
        for i in range(0, NUM_SLOTS * _SLOT_INTS, _SLOT_INTS):
            if not _is_alive(slots[i]):
                slots[i], slots[i + 1] = os.getpid(), 0
                return slots, i
        return slots, None
    finally:
        # The map keeps a copy of the descriptor, so closing ours would not unlock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Waits a bounded time: without the lock two workers may share a slot, which harms nothing."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
