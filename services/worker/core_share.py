"""Workers of one host share its cores: each computes with its part of those that are in use.

Two workers that both use all cores slow each other down far beyond half: every short parallel
region of one waits for a thread that the other has displaced. So each worker says in a small
shared file whether it computes, and before each step takes `cores / computing workers` threads,
at least one. A worker alone has all cores; the change costs microseconds.

The file holds one slot of three 64-bit integers a worker: process id, start time of that process,
and 1 while computing. A slot of a dead process is free; the start time tells it from another
process that was given the same id later. Nothing breaks when a value is read too late, or when
there can be no such file: it is a hint for speed.

Not known here: engines, steps, the tensor library.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

NUM_SLOTS = 64
"""Workers of one user on one set of cores; more of them share without being counted."""
LOCK_TRIES = 50
LOCK_PAUSE_S = 0.02
_SLOT_INTS = 3
_FILE_BYTES = NUM_SLOTS * _SLOT_INTS * 8
_SLOT_STARTS = range(0, NUM_SLOTS * _SLOT_INTS, _SLOT_INTS)
_GONE = (b"Z", b"X")
"""States of a process that has ended and waits for its parent to notice."""


class AllCores:
    """For a worker that shares nothing: its thread count is fixed."""

    def adjust(self) -> None:
        """Before each step."""

    def leave(self) -> None:
        """There is nothing to compute for now."""


class CoreShare:
    """One worker's slot. All methods are called on the thread that computes."""

    def __init__(
        self, file: Path, *, num_cores: int, set_num_threads: Callable[[int], None]
    ) -> None:
        """Claims a slot in `file`, which is created when missing. Raises OSError when it cannot."""
        self._num_cores = num_cores
        self._set_num_threads = set_num_threads
        self._num_threads = 0
        self._slots, self._mine = _claim(file)

    def adjust(self) -> None:
        """Mark this worker as computing and take its share of the cores."""
        if self._mine is not None:
            self._slots[self._mine + 2] = 1
        wanted = max(1, self._num_cores // (1 + self._count_others()))
        if wanted != self._num_threads:
            self._num_threads = wanted
            self._set_num_threads(wanted)

    def leave(self) -> None:
        """Give the cores to the others until the next `adjust`."""
        if self._mine is not None:
            self._slots[self._mine + 2] = 0

    def _count_others(self) -> int:
        slots = self._slots
        return sum(
            1
            for i in _SLOT_STARTS
            if slots[i + 2] and i != self._mine and _is_alive(slots[i], slots[i + 1])
        )


def share_cores(
    file: Path, *, num_cores: int, set_num_threads: Callable[[int], None]
) -> AllCores | CoreShare:
    """A share in `file`, or all cores where the file cannot be used."""
    try:
        return CoreShare(file, num_cores=num_cores, set_num_threads=set_num_threads)
    except OSError as error:
        logger.warning("workers of this host do not share its cores by %s: %s", file, error)
        return AllCores()


def shared_file(cores: Sequence[int]) -> Path:
    """The file of all workers of this user that may run on exactly these cores."""
    # The size is part of the name: another release may lay the slots out differently.
    key = ",".join(map(str, (_FILE_BYTES, *sorted(cores))))
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"baton-cores-{os.getuid()}-{digest}"


def _claim(file: Path) -> tuple[memoryview, int | None]:
    """The slots and the index of ours, None when all are taken."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # The lock only keeps two starting workers from taking the same slot.
        _lock(descriptor)
        if os.fstat(descriptor).st_size < _FILE_BYTES:
            os.truncate(descriptor, _FILE_BYTES)
        slots = memoryview(mmap.mmap(descriptor, _FILE_BYTES)).cast("q")
        pid = os.getpid()
        started = _start_time(pid)
        mine = next((i for i in _SLOT_STARTS if not _is_alive(slots[i], slots[i + 1])), None)
        if mine is not None:
            slots[mine], slots[mine + 1], slots[mine + 2] = pid, started, 0
        # The map keeps a copy of the descriptor, so closing ours would not unlock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return slots, mine
    finally:
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


def _is_alive(pid: int, started: int) -> bool:
    """True while the process runs that had this id and start time."""
    try:
        return pid > 0 and _start_time(pid) == started
    except OSError:
        return False


def _start_time(pid: int) -> int:
    """Clock ticks from boot to the start of a process. Raises OSError when it has ended.

    Source: proc_pid_stat(5), fields 3 and 22; field 2, the name, ends with the last bracket.
    """
    with open(f"/proc/{pid}/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
    if fields[0] in _GONE:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])
