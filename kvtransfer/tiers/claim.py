"""Which subdirectory of the disk tier's path is ours: one worker at a time, found again later.

    path/worker-000/lock    held for as long as the worker lives
                    slab-<layout fingerprint>-000000.kv ...

A worker takes the first free subdirectory with slabs of its layout, whoever wrote them: blocks are
found by their hash, so neither the worker's name nor its epoch matters. Where there is none it
takes the first free one, and slabs of another layout in it are removed, since nobody counts their
bytes. So there are never more subdirectories than there were workers at one time. The lock is the
kernel's: it ends with the process, however that ends.

Not known here: what the slabs hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from kvtransfer.tiers.slab import parse_name

MAX_WORKERS = 64
LOCK_NAME = "lock"


class Claim:
    """An exclusive hold on one subdirectory."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory = directory
        self._lock = lock

    @property
    def is_in_force(self) -> bool:
        """False once the directory was removed or replaced under us."""
        try:
            there = os.stat(self.directory / LOCK_NAME)
            ours = os.fstat(self._lock)
        except OSError:
            return False
        return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def claim(path: Path, fingerprint: str) -> Claim:
    """Take a subdirectory of the directory `path`. Raises OSError when none can be had."""
    candidates = [path / f"worker-{number:03d}" for number in range(MAX_WORKERS)]
    ours = [directory for directory in candidates if _has_slabs_of(directory, fingerprint)]
    for directory in dict.fromkeys([*ours, *candidates]):
        taken = _try(directory)
        if taken is not None:
            return taken
    raise OSError(f"{MAX_WORKERS} workers use the directory already")


def remove_strangers(directory: Path, fingerprint: str) -> int:
    """Remove slabs of other layouts and unfinished ones; how many. Raises OSError."""
    num_removed = 0
    for name in os.listdir(directory):
        slab = parse_name(name)
        if slab is not None and (slab.is_unfinished or slab.fingerprint != fingerprint):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(directory / name)
            num_removed += 1
    return num_removed


def _has_slabs_of(directory: Path, fingerprint: str) -> bool:
    try:
        slabs = [parse_name(name) for name in os.listdir(directory)]
    except OSError:
        return False
    return any(slab is not None and slab.fingerprint == fingerprint for slab in slabs)


def _try(directory: Path) -> Claim | None:
    """None when another process has it, or it belongs to another user."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    status = os.lstat(directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o170022 != 0o040000:
        # A link, or writable by others: what is read back there could be anybody's.
        return None
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock = os.open(directory / LOCK_NAME, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    taken = Claim(directory, lock)
    if not taken.is_in_force:
        # Removed between our opening and locking it.
        taken.release()
        return None
    return taken
