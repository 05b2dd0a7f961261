"""Blocks in a directory: bounded, least recently used first out, found again after a restart.

    open    claim a subdirectory, read the slabs' tables, go on in the order of their stamps
    put     take a slot (the coldest block's when all are in use), clear its entry, write the
            block, write its entry
    read    copy the block into given memory and verify it; one that is not what its entry says
            is dropped and counted

No error of the file system leaves this file: the tier stops taking blocks, says why, and tries
again after a pause. Blocks that it holds stay readable meanwhile. One thread opens, puts and
closes; another may read; `in` and `len` are for any.

Not known here: pools, the host tier, when to write, at what pace.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from pathlib import Path

from baton.core.block import BlockHash
from baton.core.clock import Clock
from baton.core.errors import ConfigError
from baton.core.fabric import TierName, TierReport
from kvtransfer.tiers.claim import Claim, claim, remove_strangers
from kvtransfer.tiers.scan import scan
from kvtransfer.tiers.slab import (
    EMPTY_ENTRY,
    ENTRY_BYTES,
    Entry,
    SlabFormat,
    block_checksum,
    pack_entry,
    read_all,
    unpack_entry,
    write_all,
)
from kvtransfer.tiers.slot_index import SlotIndex

logger = logging.getLogger(__name__)

HINTS = {
    errno.ENOSPC: "the disk is full; free some space or lower tiers.disk_bytes",
    errno.EDQUOT: "the disk quota is used up; raise it or lower tiers.disk_bytes",
    errno.EFBIG: "the limit on file sizes is reached; raise it (ulimit -f)",
    errno.EACCES: "the directory may not be used by this user; change its owner or mode",
    errno.EPERM: "the directory may not be used by this user; change its owner or mode",
    errno.EROFS: "the file system is read-only; mount it writable",
    errno.ENOTDIR: "the path is not a directory; set tiers.disk_path to one",
    errno.ENOENT: "the directory is gone",
    errno.EIO: "the drive reports an error",
}


class DiskTier:
    def __init__(
        self,
        path: Path,
        max_bytes: int,
        slab_format: SlabFormat,
        *,
        clock: Clock,
        retry_s: float,
        max_scan_s: float,
    ) -> None:
        """Touches nothing yet. Raises ConfigError when not one block fits in `max_bytes`."""
        num_slots = slab_format.num_slots_in(max_bytes)
        if num_slots < 1:
            raise ConfigError(
                f"tiers.disk_bytes {max_bytes} is below one block of {slab_format.block_bytes} "
                f"bytes with its index, {slab_format.min_bytes} bytes; raise it"
            )
        self.reason = "not opened yet"
        """Why no blocks are taken; empty while they are."""
        self.num_corrupt = 0
        """Blocks and entries that were not what they should be, all removed."""
        self._path = path
        self._max_bytes = max_bytes
        self._format = slab_format
        self._clock = clock
        self._retry_s = retry_s
        self._max_scan_s = max_scan_s
        self._retry_at_s = clock.now()
        self._lock = threading.Lock()
        self._index = SlotIndex(num_slots)
        self._claim: Claim | None = None
        self._device: int | None = None
        """Of the file system that the directory was found on first."""
        self._stamp = 0

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._index

    @property
    def pause_s(self) -> float:
        """Until the tier is to be tried again; 0 when it may be now."""
        return max(0.0, self._retry_at_s - self._clock.now())

    def open(self) -> bool:
        """Claim and read the directory unless that is done; True when blocks may be put."""
        if self.pause_s:
            return False
        held = self._claim
        if held is not None and held.is_in_force:
            return True
        self._forget()
        try:
            self._check_path()
            held = claim(self._path, self._format.fingerprint)
        except OSError as error:
            self._pause("cannot be opened", error)
            return False
        try:
            self._adopt(held)
        except OSError as error:
            held.release()
            self._pause("cannot be read", error)
            return False
        self.reason = ""
        return True

    def put(self, block_hash: BlockHash, memory: memoryview) -> bool:
        """Write the block; False when it is not taken (see `reason`, or it is here already)."""
        if not self.open() or self._claim is None:
            return False
        directory = self._claim.directory
        with self._lock:
            reserved = self._index.reserve(block_hash)
        if reserved is None:
            return False
        try:
            self._write(directory, reserved.slot, block_hash, memory)
        except OSError as error:
            with self._lock:
                self._index.abort(block_hash)
            self._pause("cannot be written", error)
            return False
        with self._lock:
            self._index.commit(block_hash)
        if self.reason:
            logger.info("disk tier takes blocks again")
            self.reason = ""
        return True

    def read(self, block_hash: BlockHash, memory: memoryview) -> bool:
        """Fill `memory` with the block; False when it is not here or not what it should be."""
        with self._lock:
            index, held = self._index, self._claim
            slot = index.pin(block_hash) if held is not None else None
        if slot is None or held is None:
            return False
        is_broken = False
        try:
            is_found = self._read(held.directory, slot, block_hash, memory)
            is_broken = not is_found
        except FileNotFoundError:
            is_found = False
            self._lose_slab(index, slot)
        except OSError as error:
            is_found = False
            is_broken = error.errno == errno.EIO
            if not is_broken:
                self._pause("cannot be read", error)
        if is_broken:
            # While it is pinned: nobody else writes there.
            self._clear_entry(held.directory, slot)
        with self._lock:
            if is_broken:
                self.num_corrupt += 1
                index.drop(block_hash)
            index.unpin(slot)
            if is_found:
                index.touch([block_hash])
        return is_found

    def close(self) -> None:
        """Let go of the directory; its blocks stay for the next worker."""
        self._forget()
        self.reason = "closed"
        self._retry_at_s = float("inf")

    def watch(self) -> None:
        """Keep note of blocks that come or go, for `take_changes`."""
        with self._lock:
            self._index.watch()

    @property
    def has_changes(self) -> bool:
        return bool(self._index.changes)

    def take_changes(self, max_blocks: int) -> list[BlockHash]:
        """Blocks that came or went since they were last taken, the earliest first."""
        with self._lock:
            return self._index.take_changes(max_blocks)

    def hashes(self) -> list[BlockHash]:
        """Of all blocks held. O(blocks)."""
        with self._lock:
            return self._index.hashes()

    def report(self) -> TierReport:
        num_blocks = len(self)
        num_bytes = num_blocks * self._format.slot_bytes
        return TierReport(TierName.DISK, num_blocks, num_bytes, self._max_bytes, self.reason)

    @property
    def is_quiet(self) -> bool:
        """No slot is being read or written."""
        with self._lock:
            return self._index.is_quiet

    def check_integrity(self) -> None:
        """Raises InternalError naming the first broken law."""
        with self._lock:
            self._index.check_integrity()

    def _check_path(self) -> None:
        """Make the directory the first time; later it must be the one it was. Raises OSError."""
        if self._device is None:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        device = os.stat(self._path).st_dev
        if self._device not in (None, device):
            # Unmounted: what is below the mount point was never meant for blocks.
            raise OSError("another file system is mounted there now; mount the drive again")
        self._device = device

    def _adopt(self, held: Claim) -> None:
        """Start with what the directory holds. Raises OSError."""
        num_removed = remove_strangers(held.directory, self._format.fingerprint)
        if num_removed:
            logger.info("disk tier: removed %d slabs of another layout", num_removed)
        found = scan(
            held.directory,
            self._format,
            num_slots=self._index.num_slots,
            clock=self._clock,
            max_scan_s=self._max_scan_s,
        )
        with self._lock:
            index = SlotIndex(self._index.num_slots, self._index.changes)
            index.adopt((entry.block_hash, entry.slot) for entry in found.entries)
            self._index = index
            self._claim = held
            self._stamp = max((entry.stamp for entry in found.entries), default=0)
            self.num_corrupt += found.num_broken

    def _forget(self) -> None:
        with self._lock:
            held, self._claim = self._claim, None
            # Readers keep the index that they pinned a slot of.
            changes = self._index.changes
            if changes is not None:
                changes.update(dict.fromkeys(self._index.hashes()))
            self._index = SlotIndex(self._index.num_slots, changes)
        if held is not None:
            held.release()

    def _write(self, directory: Path, slot: int, block_hash: BlockHash, memory: memoryview) -> None:
        """Raises OSError."""
        number, slot_in_slab = divmod(slot, self._format.slots_per_slab)
        file = self._open_slab(directory, number)
        try:
            entry_at = self._format.entry_offset(slot_in_slab)
            block_at = self._format.block_offset(slot_in_slab)
            # The old block must not be found with half of the new one in its place.
            write_all(file, EMPTY_ENTRY, entry_at)
            write_all(file, memory, block_at)
            # Starts the write-out: dirty pages never pile up until the kernel stalls writers.
            os.posix_fadvise(file, block_at, len(memory), os.POSIX_FADV_DONTNEED)
            self._stamp += 1
            checksum = block_checksum(block_hash, memory)
            entry = Entry(slot_in_slab, block_hash, self._stamp, checksum)
            write_all(file, pack_entry(entry, len(memory)), entry_at)
        finally:
            os.close(file)

    def _open_slab(self, directory: Path, number: int) -> int:
        """The slab for writing, made if need be. Raises OSError."""
        path = directory / self._format.name(number)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        start = number * self._format.slots_per_slab
        with self._lock:
            self._index.drop_slots(start, start + self._format.slots_per_slab)
        unfinished = path.with_name(path.name + ".new")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(unfinished, flags, 0o600)
        try:
            write_all(file, self._format.header(), 0)
            os.ftruncate(file, self._format.data_offset)
            os.rename(unfinished, path)
        except BaseException:
            os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        return file

    def _read(self, directory: Path, slot: int, block_hash: BlockHash, memory: memoryview) -> bool:
        """False when the slot does not hold the block. Raises OSError."""
        number, slot_in_slab = divmod(slot, self._format.slots_per_slab)
        path = directory / self._format.name(number)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            raw = os.pread(file, ENTRY_BYTES, self._format.entry_offset(slot_in_slab))
            entry = unpack_entry(slot_in_slab, raw, len(memory))
            if entry is None or entry.block_hash != block_hash:
                return False
            if not read_all(file, memory, self._format.block_offset(slot_in_slab)):
                return False
        finally:
            os.close(file)
        return block_checksum(block_hash, memory) == entry.checksum

    def _clear_entry(self, directory: Path, slot: int) -> None:
        """So that a broken block is not found again after a restart."""
        number, slot_in_slab = divmod(slot, self._format.slots_per_slab)
        with contextlib.suppress(OSError):
            path = directory / self._format.name(number)
            file = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.pwrite(file, EMPTY_ENTRY, self._format.entry_offset(slot_in_slab))
            finally:
                os.close(file)

    def _lose_slab(self, index: SlotIndex, slot: int) -> None:
        """A file of ours was removed by somebody: what it held is gone."""
        start = slot - slot % self._format.slots_per_slab
        with self._lock:
            num_lost = index.drop_slots(start, start + self._format.slots_per_slab)
        logger.warning("disk tier: a slab with %d blocks was removed", num_lost)

    def _pause(self, what: str, error: OSError) -> None:
        cause = os.strerror(error.errno) if error.errno else str(error)
        hint = HINTS.get(error.errno or 0, "")
        reason = f"the disk tier {what}: {cause}{'; ' if hint else ''}{hint}"
        if reason != self.reason:
            logger.warning("%s; tried again every %g s", reason, self._retry_s)
        self.reason = reason
        self._retry_at_s = self._clock.now() + self._retry_s
