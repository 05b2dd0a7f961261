"""The host tier and the disk tier as one: where a block is, and how it moves between them.

    pool ──save──► host ──write_back──► disk          from the cold end of each
    pool ◄──────── host ◄───────────── disk           load: a hit on disk is promoted to the host

The disk gets the blocks of the host's coldest quarter, so that a block that has to make room has
mostly been written by then; room is never waited for. Least recently used goes by chains: of
blocks loaded or saved together the later ones leave first, since they are worth nothing without
those before them.

`save` is for one thread, `write_back`, `flush` and `close` for one, `load` for one; the three may
run at once. The rest is for any. Not known here: engines, event loops, paces, when to save.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

from baton.core.block import BlockHash, BlockId
from baton.core.clock import Clock
from baton.core.fabric import TierReport
from baton.core.kv_layout import KvLayout
from baton.core.tier import Tier
from kvtransfer.tiers.config import TierConfig
from kvtransfer.tiers.copier import BlockCopier
from kvtransfer.tiers.disk_tier import DiskTier
from kvtransfer.tiers.host_tier import HostTier, PinnedBlock
from kvtransfer.tiers.slab import SlabFormat

COLD_SHARE = 4
"""One part in so many of the host tier is kept written to the disk tier."""
MAX_CANDIDATES = 64

Deliver = Callable[[Sequence[memoryview], Sequence[BlockId]], bool]
"""Copies these slots to these pool blocks; False: enough, load no more."""


class Tiers:
    def __init__(self, host: HostTier, disk: DiskTier | None, *, max_piece_bytes: int) -> None:
        self.host = host
        self.disk = disk
        self._all: tuple[HostTier | DiskTier, ...] = (host,) if disk is None else (host, disk)
        self.piece_blocks = max(1, max_piece_bytes // host.block_bytes)
        """Copied in one go; at most half of the host tier, so that two can be at once."""
        self.piece_blocks = min(self.piece_blocks, max(1, host.num_slots // 2))
        self._cold: deque[BlockHash] = deque()
        """To be written to disk, coldest first. For `write_back` alone."""
        self._has_news = True
        """Something may have moved into the cold part since `_cold` was filled."""

    @property
    def num_corrupt(self) -> int:
        """Blocks dropped since the start because they were not what they should be."""
        return self.host.num_corrupt + (self.disk.num_corrupt if self.disk is not None else 0)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self.host or (self.disk is not None and block_hash in self.disk)

    def num_restorable(self, block_hashes: Sequence[BlockHash]) -> int:
        """Length of the longest leading part of `block_hashes` that is held here now."""
        return sum(1 for _ in takewhile(self.__contains__, block_hashes))

    def watch(self) -> None:
        """Keep note of blocks that come or go, for `take_changes`."""
        for tier in self._all:
            tier.watch()

    @property
    def has_changes(self) -> bool:
        return any(tier.has_changes for tier in self._all)

    def take_changes(self, max_blocks: int) -> list[BlockHash]:
        """Blocks that came to a tier or left one since they were last taken; see `tier_of`."""
        taken: list[BlockHash] = []
        for tier in self._all:
            taken += tier.take_changes(max_blocks - len(taken))
        return taken

    def tier_of(self, block_hash: BlockHash) -> Tier | None:
        """The better of the tiers that hold the block now."""
        if block_hash in self.host:
            return Tier.HOST
        return Tier.DISK if self.disk is not None and block_hash in self.disk else None

    def held(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes in the host tier and in the disk tier. O(blocks)."""
        return self.host.hashes(), [] if self.disk is None else self.disk.hashes()

    def save(
        self, blocks: Sequence[tuple[BlockHash, BlockId]], copier: BlockCopier
    ) -> list[BlockId]:
        """Copy blocks of the pool into the host tier, given coldest first.

        Returns those that are held here afterwards; the others found no room. Raises
        TransferError, after which nothing new is held.
        """
        saved = []
        wanted: list[tuple[BlockHash, BlockId, memoryview]] = []
        for block_hash, block_id in blocks:
            if block_hash in self:
                self.host.touch([block_hash])
                saved.append(block_id)
                continue
            memory = self.host.reserve(block_hash)
            if memory is not None:
                wanted.append((block_hash, block_id, memory))
        try:
            copier.copy_out([b for _, b, _ in wanted], [memory for _, _, memory in wanted])
        except BaseException:
            for block_hash, _, _ in wanted:
                self.host.abort(block_hash)
            raise
        for block_hash, block_id, memory in wanted:
            self.host.commit(block_hash, memory)
            saved.append(block_id)
        self._has_news = True
        return saved

    def load(
        self,
        block_hashes: Sequence[BlockHash],
        block_ids: Sequence[BlockId],
        deliver: Deliver,
    ) -> int:
        """Deliver the longest leading part of `block_hashes` that is held here, verified.

        Returns its length. Ends early at a block that turned out corrupt or unreadable.
        """
        num_loaded = 0
        # Promotions are not to push out what is needed next.
        self.host.touch(reversed(block_hashes))
        while num_loaded < len(block_hashes):
            piece = block_hashes[num_loaded : num_loaded + self.piece_blocks]
            pinned = self._pin_leading(piece)
            try:
                ids = block_ids[num_loaded : num_loaded + len(pinned)]
                if not pinned or not deliver([block.memory for block in pinned], ids):
                    break
            finally:
                for block in pinned:
                    self.host.unpin(block)
            num_loaded += len(pinned)
            if len(pinned) < len(piece):
                break
        self.host.touch(reversed(block_hashes[:num_loaded]))
        return num_loaded

    def write_back(self) -> int:
        """Write one cold host block to disk. Bytes written; 0: nothing to do, or no disk."""
        disk = self.disk
        if disk is None or not disk.open():
            return 0
        while (block_hash := self._next_cold()) is not None:
            if self._copy_to_disk(block_hash, disk):
                return self.host.block_bytes
            if disk.reason:
                self._has_news = True
                return 0
        return 0

    @property
    def retry_in_s(self) -> float | None:
        """When `write_back` is worth calling again although nothing was saved; None: never."""
        if self.disk is None or not (self.disk.reason and (self._has_news or self._cold)):
            return None
        return self.disk.pause_s

    def flush(self, clock: Clock, timeout_s: float) -> int:
        """Write host blocks to disk, most recently used first, for a bounded time; how many."""
        deadline_s = clock.now() + timeout_s
        num_written = 0
        if self.disk is None or not self.disk.open():
            return 0
        for block_hash in self.host.hottest_first():
            if clock.now() >= deadline_s or self.disk.reason:
                break
            num_written += self._copy_to_disk(block_hash, self.disk)
        return num_written

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()

    def reports(self) -> tuple[TierReport, ...]:
        return tuple(tier.report() for tier in self._all)

    @property
    def is_quiet(self) -> bool:
        """Nothing is being copied."""
        return self.host.is_quiet and (self.disk is None or self.disk.is_quiet)

    def check_integrity(self) -> None:
        """Raises InternalError naming the first broken law."""
        self.host.check_integrity()
        if self.disk is not None:
            self.disk.check_integrity()

    def _pin_leading(self, block_hashes: Sequence[BlockHash]) -> list[PinnedBlock]:
        pinned = []
        for block_hash in block_hashes:
            block = self.host.pin(block_hash) or self._promote(block_hash)
            if block is None:
                break
            pinned.append(block)
        return pinned

    def _promote(self, block_hash: BlockHash) -> PinnedBlock | None:
        """The block from disk, in a pinned host slot."""
        if self.disk is None or block_hash not in self.disk:
            return None
        memory = self.host.reserve(block_hash)
        if memory is None:
            # Saved by the writer in this moment, or no slot is to be had.
            return self.host.pin(block_hash)
        is_found = False
        try:
            is_found = self.disk.read(block_hash, memory)
        finally:
            if not is_found:
                self.host.abort(block_hash)
        if not is_found:
            return None
        return self.host.commit_pinned(block_hash, memory)

    def _next_cold(self) -> BlockHash | None:
        assert self.disk is not None
        if not self._cold and self._has_news:
            self._has_news = False
            num_slots = self.host.num_slots
            num_cold = max(1, num_slots // COLD_SHARE) - self.host.num_free
            unwritten = [h for h in self.host.coldest(num_cold) if h not in self.disk]
            self._cold.extend(unwritten[:MAX_CANDIDATES])
            self._has_news = len(unwritten) > MAX_CANDIDATES
        return self._cold.popleft() if self._cold else None

    def _copy_to_disk(self, block_hash: BlockHash, disk: DiskTier) -> bool:
        if block_hash in disk:
            return False
        block = self.host.pin(block_hash)
        if block is None:
            return False
        try:
            return disk.put(block_hash, block.memory)
        finally:
            self.host.unpin(block)


def build_tiers(config: TierConfig, layout: KvLayout, *, clock: Clock) -> Tiers | None:
    """None when no tiers are wanted. Touches no files yet.

    Raises ConfigError when not one block fits in a tier that is.
    """
    if not config.is_enabled:
        return None
    host = HostTier(config.host_bytes, layout.block_bytes, is_checked=config.check_host_memory)
    disk = None
    if config.disk_path is not None:
        disk = DiskTier(
            config.disk_path,
            config.disk_bytes,
            SlabFormat(layout.fingerprint, layout.block_bytes),
            clock=clock,
            retry_s=config.retry_s,
            max_scan_s=config.max_scan_s,
        )
    return Tiers(host, disk, max_piece_bytes=config.max_piece_bytes)
