"""Block accounting: every transition, every refusal, and a long random walk."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.block import BlockHash, BlockId
from baton.core.errors import InternalError
from baton.engine.block_pool import BlockPool, PoolCounts
from baton.engine.block_state import BlockState
from baton.engine.free_runs import FreeRuns


def h(n: int) -> BlockHash:
    return BlockHash(n.to_bytes(16, "big"))


def commit_all(pool: BlockPool, block_ids: list[BlockId], first_hash: int = 0) -> None:
    for i, block_id in enumerate(block_ids):
        pool.commit(block_id, h(first_hash + i))


def test_fresh_pool_is_one_run_of_free_blocks() -> None:
    pool = BlockPool(8)
    assert pool.counts == PoolCounts(8, 0, 0, 0, 0)
    assert pool.allocate(8) == list(range(8))
    assert pool.num_available == 0


def test_unhashed_blocks_become_free_and_hashed_ones_cached() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.commit(blocks[0], h(1))
    pool.commit(blocks[1], None)
    pool.release(blocks)
    assert pool.counts == PoolCounts(3, 1, 0, 0, 0)
    assert pool.match([h(1)]) == [blocks[0]]
    pool.check_integrity()


def test_match_stops_at_the_first_unknown_hash() -> None:
    pool = BlockPool(4)
    commit_all(pool, pool.allocate(3))
    assert pool.match([h(0), h(1), h(9), h(2)]) == [0, 1]
    assert pool.match([h(9), h(0)]) == []
    assert pool.match([]) == []


def test_block_is_shared_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    commit_all(pool, blocks)
    pool.acquire(pool.match([h(0)]))
    pool.release(blocks)
    assert pool.counts.active == 1
    pool.release(blocks)
    assert pool.counts == PoolCounts(1, 1, 0, 0, 0)


def test_tail_of_a_table_is_evicted_before_its_prefix() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    commit_all(pool, blocks)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.match([h(0), h(1), h(2), h(3)]) == blocks[:2]


def test_least_recently_released_is_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    commit_all(pool, blocks)
    for block_id in blocks:
        pool.release([block_id])
    pool.acquire([blocks[0]])
    pool.release([blocks[0]])
    assert pool.allocate(1) == [blocks[1]]


def test_free_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    commit_all(pool, blocks)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.counts.cached == 2


def test_duplicate_hash_keeps_the_first_block_as_entry() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.commit(first, h(5))
    pool.commit(second, h(5))
    assert pool.match([h(5)]) == [first]
    pool.release([second])
    assert pool.counts == PoolCounts(3, 0, 1, 0, 0)
    assert pool.take_events().stored == [h(5)]


def test_leased_block_is_neither_freed_nor_evicted() -> None:
    pool = BlockPool(2)
    hashed, plain = pool.allocate(2)
    pool.commit(hashed, h(1))
    pool.commit(plain, None)
    pool.lease([hashed, plain])
    pool.release([hashed, plain])
    assert pool.counts == PoolCounts(0, 0, 0, 2, 0)
    with pytest.raises(InternalError, match="0 are available"):
        pool.allocate(1)
    pool.unlease([hashed, plain])
    assert pool.counts == PoolCounts(1, 1, 0, 0, 0)


def test_leases_are_counted_not_flagged() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.commit(blocks[0], None)
    pool.lease(blocks)
    pool.lease(blocks)
    pool.release(blocks)
    pool.unlease(blocks)
    assert pool.counts.leased_only == 1
    pool.unlease(blocks)
    assert pool.counts.free == 1


def test_block_held_by_leases_alone_can_be_matched_and_acquired() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    commit_all(pool, blocks)
    pool.lease(blocks)
    pool.release(blocks)
    pool.acquire(pool.match([h(0)]))
    pool.unlease(blocks)
    assert pool.counts.active == 1
    pool.check_integrity()


def test_reserved_blocks_arrive_or_go_into_quarantine() -> None:
    pool = BlockPool(4)
    arrived = pool.allocate(2, is_reserved=True)
    lost = pool.allocate(2, is_reserved=True)
    pool.mark_arrived(arrived)
    commit_all(pool, arrived)
    pool.quarantine(lost)
    assert pool.counts == PoolCounts(0, 0, 2, 0, 2)
    pool.recover(lost)
    assert pool.counts == PoolCounts(2, 0, 2, 0, 0)
    pool.check_integrity()


def test_quarantine_is_all_or_nothing() -> None:
    pool = BlockPool(2)
    reserved = pool.allocate(1, is_reserved=True)
    filling = pool.allocate(1)
    with pytest.raises(InternalError, match="read into"):
        pool.quarantine(reserved + filling)
    assert pool.counts.quarantined == 0
    pool.check_integrity()


@pytest.mark.parametrize(
    ("operation", "law"),
    [
        (lambda pool, b: pool.release([b]), "no holder"),
        (lambda pool, b: pool.commit(b, h(1)), "being filled"),
        (lambda pool, b: pool.lease([b]), "complete"),
        (lambda pool, b: pool.unlease([b]), "not leased"),
        (lambda pool, b: pool.acquire([b]), "hashed"),
        (lambda pool, b: pool.mark_arrived([b]), "not reserved"),
        (lambda pool, b: pool.quarantine([b]), "read into"),
        (lambda pool, b: pool.recover([b]), "quarantine"),
    ],
)
def test_operations_on_a_free_block_are_refused(operation, law: str) -> None:
    pool = BlockPool(1)
    with pytest.raises(InternalError, match=law):
        operation(pool, BlockId(0))
    pool.check_integrity()


def test_events_are_net() -> None:
    pool = BlockPool(1)
    block = pool.allocate(1)
    pool.commit(block[0], h(1))
    pool.release(block)
    again = pool.allocate(1)
    assert not pool.has_events
    pool.commit(again[0], h(2))
    pool.take_events()
    pool.release(again)
    third = pool.allocate(1)
    assert pool.take_events() == ([], [h(2)])
    pool.commit(third[0], h(2))
    assert pool.take_events() == ([h(2)], [])
    assert not pool.has_events


def test_allocation_continues_behind_the_last_block() -> None:
    pool = BlockPool(10)
    table = pool.allocate(3)
    pool.release([table[2]])
    assert pool.allocate(1, after=table[1]) == [2]
    assert pool.allocate(2, after=BlockId(2)) == [3, 4]


def test_allocation_prefers_one_run_that_fits_over_pieces() -> None:
    pool = BlockPool(16)
    everything = pool.allocate(16)
    pool.release([BlockId(i) for i in (0, 2, 4, 6)])
    pool.release(everything[8:13])
    assert pool.allocate(4) == [8, 9, 10, 11]
    assert len(pool.allocate(5)) == 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.data())
def test_free_runs_equal_a_set_of_ids(num_blocks: int, data: st.DataObject) -> None:
    runs, model = FreeRuns(num_blocks), set(range(num_blocks))
    taken: list[BlockId] = []
    for _ in range(data.draw(st.integers(0, 40))):
        if taken and data.draw(st.booleans()):
            block_id = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
            runs.add(block_id)
            model.add(block_id)
        else:
            after = data.draw(st.none() | st.integers(0, num_blocks - 1).map(BlockId))
            got = runs.take(data.draw(st.integers(0, len(runs))), after)
            assert len(set(got)) == len(got) and model.issuperset(got)
            model.difference_update(got)
            taken += got
        spans = runs.runs()
        assert {i for start, n in spans for i in range(start, start + n)} == model
        assert len(runs) == len(model)
        ends = [start + n for start, n in spans]
        assert all(end < start for end, (start, _) in zip(ends, spans[1:], strict=False))


class Walker:
    """Random legal operations, with the holders and leases the pool should know of."""

    def __init__(self, seed: int, num_blocks: int) -> None:
        self.random = random.Random(seed)
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[BlockId]] = []
        self.reserved: list[list[BlockId]] = []
        self.leases: list[list[BlockId]] = []
        self.quarantined: list[BlockId] = []
        self.hashes: set[BlockHash] = set()

    def step(self) -> None:
        often = [self.allocate, self.commit, self.release]
        once = [self.reserve, self.share, self.lease, self.unlease, self.arrive]
        rare = [self.quarantine, self.recover]
        operation = self.random.choice([*often, *often, *once, *rare])
        operation()
        self.tables, self.reserved, self.leases = (
            [table for table in tables if table]
            for tables in (self.tables, self.reserved, self.leases)
        )
        self.pool.check_integrity()
        self.check_model()

    def check_model(self) -> None:
        holders = Counter(b for table in self.tables + self.reserved for b in table)
        leases = Counter(b for lease in self.leases for b in lease)
        for block in self.pool.blocks():
            assert block.ref_count == holders[block.block_id]
            assert block.lease_count == leases[block.block_id]
        stored, removed = self.pool.take_events()
        assert not self.hashes & set(stored) and self.hashes >= set(removed)
        self.hashes = (self.hashes | set(stored)) - set(removed)
        assert self.hashes == set(self.pool.cached_hashes())
        counts = self.pool.counts
        assert counts.quarantined == len(self.quarantined)

    def pop(self, items: list[list[BlockId]]) -> list[BlockId] | None:
        return items.pop(self.random.randrange(len(items))) if items else None

    def allocate(self) -> None:
        num = self.random.randint(0, min(4, self.pool.num_available))
        table = self.random.choice(self.tables) if self.tables else []
        new = self.pool.allocate(num, after=table[-1] if table else None)
        (self.tables.append if self.random.random() < 0.5 or not table else table.extend)(new)

    def reserve(self) -> None:
        num = self.random.randint(0, min(3, self.pool.num_available))
        self.reserved.append(self.pool.allocate(num, is_reserved=True))

    def commit(self) -> None:
        table = self.random.choice(self.tables) if self.tables else []
        state = BlockState.FILLING
        filling = [b for b in table if self.pool.blocks()[b].state is state]
        if filling:
            block_hash = None if self.random.random() < 0.2 else h(self.random.randrange(40))
            self.pool.commit(self.random.choice(filling), block_hash)

    def share(self) -> None:
        hashes = [h(self.random.randrange(40)) for _ in range(6)]
        matched = self.pool.match(hashes)
        matched = list(dict.fromkeys(matched))
        self.pool.acquire(matched)
        self.tables.append(matched)

    def release(self) -> None:
        # In bursts, so that small pools run empty of holders now and then.
        for _ in range(self.random.choice([1, 1, 1, len(self.tables)])):
            table = self.pop(self.tables)
            if table is not None:
                self.pool.release(table)

    def lease(self) -> None:
        table = self.random.choice(self.tables) if self.tables else []
        active = [b for b in table if self.pool.blocks()[b].state is BlockState.ACTIVE]
        self.pool.lease(active)
        self.leases.append(active)

    def unlease(self) -> None:
        lease = self.pop(self.leases)
        if lease is not None:
            self.pool.unlease(lease)

    def arrive(self) -> None:
        table = self.pop(self.reserved)
        if table is not None:
            self.pool.mark_arrived(table)
            self.tables.append(table)

    def quarantine(self) -> None:
        table = self.pop(self.reserved)
        if table is not None:
            cut = self.random.randint(0, len(table))
            self.pool.quarantine(table[:cut])
            self.pool.release(table[cut:])
            self.quarantined += table[:cut]

    def recover(self) -> None:
        cut = self.random.randint(0, len(self.quarantined))
        self.pool.recover(self.quarantined[:cut])
        del self.quarantined[:cut]

    def settle(self) -> None:
        """Let go of everything."""
        for table in self.tables + self.reserved:
            self.pool.release(table)
        for lease in self.leases:
            self.pool.unlease(lease)
        self.pool.recover(self.quarantined)


@pytest.mark.parametrize(("seed", "num_blocks"), [(1, 1), (2, 7), (3, 24), (4, 64)])
def test_random_walk_keeps_the_laws_and_leaks_nothing(seed: int, num_blocks: int) -> None:
    walker = Walker(seed, num_blocks)
    seen = dict.fromkeys(BlockState, 0)
    for _ in range(4000):
        walker.step()
        for block in walker.pool.blocks():
            seen[block.state] += 1
    assert all(seen.values()), f"the walk never reached some state: {seen}"
    walker.settle()
    walker.pool.check_integrity()
    free, cached, active, leased, quarantined = walker.pool.counts
    assert free + cached == num_blocks
    assert (active, leased, quarantined) == (0, 0, 0)
