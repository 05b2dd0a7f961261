"""Accounting of the KV pool's blocks: who holds them, what they hold, when they are free again.

    FREE ──► FILLING ──► ACTIVE ──► CACHED ──► FREE        computed here
      └────► RESERVED ──► FILLING                          read from another worker
                └──► QUARANTINED ──► FREE                  the read was given up but may still land
    ACTIVE, CACHED ──► LEASED ──► CACHED or FREE           no holder left, but a reader
             ACTIVE ──► FILLING                            a frozen sequence goes on writing

A block is FILLING while its one holder writes it, ACTIVE once complete (ref_count >= 1, shareable
when hashed), CACHED at ref_count 0 under its hash. The lease count stands beside the state: a
leased block is never freed, evicted or written, and stays matchable. Cached blocks leave in the
order they were released (`eviction`), and a table is released from its end, so a prefix outlives
what follows it.

Laws: only this file frees blocks; every block is in exactly one state; free + cached + active +
leased-only + quarantined == total. A broken law raises InternalError at the call that breaks it.

Not known here: tokens, requests, memory, time. All methods cost O(blocks named), never O(pool),
except the two that say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from baton.core.block import BlockHash, BlockId
from baton.core.errors import InternalError
from baton.engine.block_state import Block, BlockState, broken
from baton.engine.eviction import EvictionOrder
from baton.engine.free_runs import FreeRuns
from baton.engine.integrity import check_block


class PoolCounts(NamedTuple):
    """Where all blocks are. Sums to the pool's size."""

    free: int
    cached: int
    active: int
    """ref_count >= 1: RESERVED, FILLING and ACTIVE together."""
    leased_only: int
    quarantined: int


class KvEvents(NamedTuple):
    """Net change of the set of matchable hashes; the two lists have no hash in common."""

    stored: list[BlockHash]
    removed: list[BlockHash]


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise InternalError(f"a pool needs at least one block, got {num_blocks}")
        self._blocks = [Block(BlockId(i)) for i in range(num_blocks)]
        self._free = FreeRuns(num_blocks)
        self._cached = EvictionOrder()
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._num_leased_only = 0
        self._num_quarantined = 0
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def has_events(self) -> bool:
        return bool(self._stored or self._removed)

    @property
    def counts(self) -> PoolCounts:
        free, cached = len(self._free), len(self._cached)
        held = self._num_leased_only + self._num_quarantined
        active = self.num_blocks - free - cached - held
        return PoolCounts(free, cached, active, self._num_leased_only, self._num_quarantined)

    def blocks(self) -> Sequence[Block]:
        """The live accounts by id, for reading only."""
        return self._blocks

    def match(self, hashes: Iterable[BlockHash]) -> list[BlockId]:
        """Blocks of the longest leading part of `hashes` that is in the pool. Changes nothing."""
        matched: list[BlockId] = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            matched.append(block_id)
        return matched

    def num_cached_among(self, block_ids: Iterable[BlockId]) -> int:
        """How many of `block_ids` stop being available once acquired."""
        return sum(self._blocks[b].state is BlockState.CACHED for b in block_ids)

    def acquire(self, block_ids: Iterable[BlockId]) -> None:
        """Add one holder to each of these matched blocks."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.block_hash is None:
                raise broken("acquire", block, "only hashed blocks are shared")
            if block.state is BlockState.CACHED:
                self._cached.discard(block_id)
            elif block.state is BlockState.LEASED:
                self._num_leased_only -= 1
            # A tier keeps what it was last given: by the time this block is cold again, its copy,
            # which nobody used, may be gone.
            block.is_cold = block.is_saved = False
            block.state = BlockState.ACTIVE
            block.ref_count += 1

    def allocate(
        self, num_blocks: int, *, after: BlockId | None = None, is_reserved: bool = False
    ) -> list[BlockId]:
        """Hand out blocks with one holder, evicting cached ones where free ones do not suffice.

        Ids come in as few consecutive runs as possible, continuing at `after` + 1 if that is
        free. Raises InternalError when fewer than `num_blocks` are available.
        """
        if num_blocks > self.num_available:
            raise InternalError(f"{num_blocks} blocks wanted, {self.num_available} are available")
        while len(self._free) < num_blocks:
            self._evict_oldest()
        block_ids = self._free.take(num_blocks, after)
        state = BlockState.RESERVED if is_reserved else BlockState.FILLING
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.state = state
            block.ref_count = 1
        return block_ids

    def mark_arrived(self, block_ids: Iterable[BlockId]) -> None:
        """The reads into these reserved blocks are over and vouched for: RESERVED → FILLING."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.state is not BlockState.RESERVED:
                raise broken("mark_arrived", block, "it was not reserved")
            block.state = BlockState.FILLING

    def commit(self, block_id: BlockId, block_hash: BlockHash | None) -> None:
        """The block is complete; with a hash it becomes matchable.

        When the hash is in the cache already, that block stays the entry and this one unhashed.
        """
        block = self._blocks[block_id]
        if block.state is not BlockState.FILLING:
            raise broken("commit", block, "only a block being filled can be completed")
        block.state = BlockState.ACTIVE
        if block_hash is not None and block_hash not in self._by_hash:
            block.block_hash = block_hash
            self._by_hash[block_hash] = block_id
            _record(block_hash, into=self._stored, cancels=self._removed)

    def reopen(self, block_id: BlockId) -> None:
        """The one holder of this complete block goes on writing it: ACTIVE → FILLING."""
        block = self._blocks[block_id]
        is_shared = block.ref_count != 1 or block.lease_count or block.block_hash is not None
        if block.state is not BlockState.ACTIVE or is_shared:
            raise broken("reopen", block, "others may read it")
        block.state = BlockState.FILLING

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Drop one holder of each block of a table, last block first."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.ref_count < 1:
                raise broken("release", block, "it has no holder")
            block.ref_count -= 1
            if block.ref_count == 0:
                self._retire(block)

    def lease(self, block_ids: Iterable[BlockId]) -> None:
        """Keep these complete blocks as they are until `unlease`, whoever else lets go."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.state is BlockState.CACHED:
                self._cached.discard(block_id)
                block.state = BlockState.LEASED
                self._num_leased_only += 1
            elif block.state not in (BlockState.ACTIVE, BlockState.LEASED):
                raise broken("lease", block, "only complete blocks are leased")
            block.is_cold = False
            block.lease_count += 1

    def unlease(self, block_ids: Sequence[BlockId]) -> None:
        """End one lease of each block, last block first."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.lease_count < 1:
                raise broken("unlease", block, "it is not leased")
            block.lease_count -= 1
            if block.state is BlockState.LEASED and block.lease_count == 0:
                self._num_leased_only -= 1
                self._retire(block)

    def lease_unsaved(self, max_blocks: int) -> list[tuple[BlockHash, BlockId]]:
        """Lease the coldest cached blocks that no tier has, coldest first."""
        leased: list[tuple[BlockHash, BlockId]] = []
        while len(leased) < max_blocks and self._cached.num_unsaved:
            block = self._blocks[self._cached.coldest_unsaved()]
            if block.block_hash is None:
                raise broken("lease_unsaved", block, "a cached block has a hash")
            self.lease([block.block_id])
            block.is_cold = True
            leased.append((block.block_hash, block.block_id))
        return leased

    def unlease_saved(self, block_ids: Sequence[BlockId], *, is_saved: bool) -> None:
        """End the leases of `lease_unsaved`, in the order of taking.

        Unused blocks go back to the cold end as they lay there, used ones to the warm end.
        """
        cold: list[BlockId] = []
        warm: list[BlockId] = []
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.is_saved = is_saved
            (cold if block.is_cold else warm).append(block_id)
        self.unlease(cold)
        self.unlease(warm[::-1])

    def quarantine(self, block_ids: Iterable[BlockId]) -> None:
        """Take reserved blocks out of use: a read that was given up may still write to them.

        All or none: a wrong id raises before anything has changed.
        """
        blocks = [self._blocks[block_id] for block_id in block_ids]
        for block in blocks:
            if block.state is not BlockState.RESERVED:
                raise broken("quarantine", block, "only reserved blocks are read into")
        for block in blocks:
            block.state = BlockState.QUARANTINED
            block.ref_count = 0
            self._num_quarantined += 1

    def recover(self, block_ids: Iterable[BlockId]) -> None:
        """Nothing writes to these quarantined blocks any more: QUARANTINED → FREE."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.state is not BlockState.QUARANTINED:
                raise broken("recover", block, "it is not in quarantine")
            self._num_quarantined -= 1
            self._retire(block)

    def has(self, block_hash: BlockHash) -> bool:
        """Whether the hash is matchable."""
        return block_hash in self._by_hash

    def cached_hashes(self) -> list[BlockHash]:
        """Every matchable hash, whether its block has holders or not. O(pool)."""
        return list(self._by_hash)

    def take_events(self) -> KvEvents:
        """What became matchable and what ceased to be since the last call, net."""
        events = KvEvents(list(self._stored), list(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events

    def check_integrity(self) -> None:
        """Recount everything; raises InternalError naming the first broken law. O(pool)."""
        in_state = dict.fromkeys(BlockState, 0)
        for block in self._blocks:
            in_state[block.state] += 1
            check_block(block)
            if block.block_hash is not None and self._by_hash.get(block.block_hash) != (
                block.block_id
            ):
                raise broken("check_integrity", block, "the cache names another block")
        free_ids = {i for start, n in self._free.runs() for i in range(start, start + n)}
        expected_ids = {b.block_id for b in self._blocks if b.state is BlockState.FREE}
        cached = [b for b in self._blocks if b.state is BlockState.CACHED]
        laws = {
            "free blocks are the free runs": free_ids == expected_ids,
            "free runs are counted": len(self._free) == len(free_ids),
            "cached blocks have an order of eviction": self._cached.has_laws(
                [b.block_id for b in cached], [b.block_id for b in cached if not b.is_saved]
            ),
            "every hash has its block": len(self._by_hash)
            == sum(b.block_hash is not None for b in self._blocks),
            "leased-only is counted": self._num_leased_only == in_state[BlockState.LEASED],
            "quarantine is counted": self._num_quarantined == in_state[BlockState.QUARANTINED],
            "counts sum to the pool": sum(self.counts) == self.num_blocks,
            "events are net": not (self._stored.keys() & self._removed.keys()),
        }
        for law, holds in laws.items():
            if not holds:
                raise InternalError(f"block pool broke a law: {law}; {self.counts}")

    def _retire(self, block: Block) -> None:
        """Where a block goes that lost its last holder or lease."""
        if block.lease_count:
            block.state = BlockState.LEASED
            self._num_leased_only += 1
        elif block.block_hash is not None:
            block.state = BlockState.CACHED
            self._cached.add(block.block_id, is_saved=block.is_saved, is_cold=block.is_cold)
            block.is_cold = False
        else:
            block.state = BlockState.FREE
            self._free.add(block.block_id)

    def _evict_oldest(self) -> None:
        block = self._blocks[self._cached.coldest()]
        self._cached.discard(block.block_id)
        if block.block_hash is None:
            raise broken("evict", block, "a cached block has a hash")
        del self._by_hash[block.block_hash]
        _record(block.block_hash, into=self._removed, cancels=self._stored)
        block.block_hash = None
        block.is_saved = False
        self._retire(block)


def _record(
    block_hash: BlockHash, *, into: dict[BlockHash, None], cancels: dict[BlockHash, None]
) -> None:
    if block_hash in cancels:
        del cancels[block_hash]
    else:
        into[block_hash] = None
