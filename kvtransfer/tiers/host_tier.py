"""Blocks in host memory: one arena of block-sized slots, bounded, least recently used first out.

    reserve ─► (caller fills the slot) ─► commit        pin ─► (caller reads the slot) ─► unpin

The arena is anonymous memory that becomes resident as slots are first used, starts on a page
boundary and never moves, so it can be registered as pinned memory of a GPU. A slot is written by
the one who reserved it, and kept as it is while somebody has pinned it. Methods may be called
from any thread; bytes move outside the lock.

Not known here: pools, the disk, when to save.
"""

from __future__ import annotations

import mmap
import threading
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from baton.core.block import BlockHash
from baton.core.errors import ConfigError
from baton.core.fabric import TierName, TierReport
from kvtransfer.tiers.slot_index import SlotIndex


class PinnedBlock(NamedTuple):
    slot: int
    memory: memoryview
    """block_bytes, to be read only."""


class HostTier:
    def __init__(self, max_bytes: int, block_bytes: int, *, is_checked: bool = False) -> None:
        """`is_checked`: blocks are verified by checksum when pinned.

        Raises ConfigError when not one block fits, or the machine has no such memory.
        """
        if max_bytes < block_bytes:
            raise ConfigError(
                f"tiers.host_bytes {max_bytes} is below one block of {block_bytes} bytes; raise it"
            )
        self.block_bytes = block_bytes
        self.num_slots = max_bytes // block_bytes
        self._max_bytes = max_bytes
        # Private: shared memory costs several times as much to fault in. Huge pages are not asked
        # for: with the page cache full of our own files the kernel compacts memory at each fault.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            arena = mmap.mmap(-1, self.num_slots * block_bytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"tiers.host_bytes {max_bytes} cannot be had from this machine ({error}); lower it"
            ) from None
        self.arena = memoryview(arena)
        """All slots, back to back."""
        self._lock = threading.Lock()
        self._index = SlotIndex(self.num_slots)
        self._checksums: dict[int, int] | None = {} if is_checked else None
        self.num_corrupt = 0

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._index

    @property
    def num_free(self) -> int:
        return self._index.num_free

    def reserve(self, block_hash: BlockHash) -> memoryview | None:
        """A slot to fill, the coldest block's when none is free.

        None: the block is here or on its way, or every slot is in use at this moment.
        """
        with self._lock:
            reserved = self._index.reserve(block_hash)
            if reserved is None:
                return None
            if self._checksums is not None:
                self._checksums.pop(reserved.slot, None)
            return self._slot(reserved.slot)

    def commit(self, block_hash: BlockHash, memory: memoryview) -> None:
        """The reserved slot holds the block; it is found from now on."""
        self.unpin(self.commit_pinned(block_hash, memory))

    def commit_pinned(self, block_hash: BlockHash, memory: memoryview) -> PinnedBlock:
        """The same, and the block is pinned."""
        checksum = zlib.crc32(memory) if self._checksums is not None else 0
        with self._lock:
            self._index.commit(block_hash)
            slot = self._index.pin(block_hash)
            assert slot is not None
            if self._checksums is not None:
                self._checksums[slot] = checksum
        return PinnedBlock(slot, memory)

    def abort(self, block_hash: BlockHash) -> None:
        with self._lock:
            self._index.abort(block_hash)

    def pin(self, block_hash: BlockHash) -> PinnedBlock | None:
        """The block's memory, kept until `unpin`. None when it is not here, or found corrupt."""
        with self._lock:
            slot = self._index.pin(block_hash)
        if slot is None:
            return None
        memory = self._slot(slot)
        if self._checksums is not None and zlib.crc32(memory) != self._checksums[slot]:
            with self._lock:
                self.num_corrupt += 1
                self._index.drop(block_hash)
                self._index.unpin(slot)
            return None
        return PinnedBlock(slot, memory)

    def unpin(self, block: PinnedBlock) -> None:
        with self._lock:
            self._index.unpin(block.slot)

    def touch(self, block_hashes: Iterable[BlockHash]) -> None:
        """Make these the most recently used, the last one newest."""
        with self._lock:
            self._index.touch(block_hashes)

    def drop(self, block_hash: BlockHash) -> None:
        with self._lock:
            self._index.drop(block_hash)

    def coldest(self, num_blocks: int) -> Sequence[BlockHash]:
        with self._lock:
            return self._index.coldest(num_blocks)

    def hottest_first(self) -> Sequence[BlockHash]:
        with self._lock:
            return self._index.hottest_first()

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
        return TierReport(TierName.HOST, num_blocks, num_blocks * self.block_bytes, self._max_bytes)

    @property
    def is_quiet(self) -> bool:
        """No slot is pinned or being written."""
        with self._lock:
            return self._index.is_quiet

    def check_integrity(self) -> None:
        """Raises InternalError naming the first broken law."""
        with self._lock:
            self._index.check_integrity()

    def _slot(self, slot: int) -> memoryview:
        return self.arena[slot * self.block_bytes : (slot + 1) * self.block_bytes]
