from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from baton.core.block import join_hashes
from baton.core.tier import Tier
from services.router.index import prefix_changes as prefix_changes_module
from services.router.index import prefix_index as prefix_index_module
from services.router.index import prefix_table as prefix_table_module
from services.router.index.prefix_index import PrefixIndex


def block(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


CHAIN = [block(i) for i in range(200)]


def lengths(index: PrefixIndex, hashes: list[bytes], tier: Tier = Tier.DISK) -> dict[str, int]:
    return index.match(hashes).by_worker(tier)


def set_batch(monkeypatch: pytest.MonkeyPatch, num_hashes: int) -> None:
    for module in (prefix_index_module, prefix_changes_module):
        monkeypatch.setattr(module, "BATCH_HASHES", num_hashes)


def test_longest_match_per_worker():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:5])
    index.store("b", CHAIN[:9])
    index.store("c", CHAIN[1:9])
    assert lengths(index, CHAIN) == {"a": 5, "b": 9}
    assert lengths(index, CHAIN[:3]) == {"a": 3, "b": 3}
    assert lengths(index, CHAIN[100:]) == {} and lengths(index, []) == {}
    assert lengths(index, CHAIN[:1]) == {"a": 1, "b": 1}


def test_match_tells_slots_and_tiers():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:90])
    index.store("b", CHAIN[:70], Tier.DISK)
    index.store("b", CHAIN[:40], Tier.HOST)
    index.store("b", CHAIN[:10])
    match = index.match(CHAIN)
    assert match.lengths.shape == (3, index.num_slots)
    assert match.lengths[:, index.slot_of("a")].tolist() == [90, 90, 90]
    assert match.lengths[:, index.slot_of("b")].tolist() == [10, 40, 70]
    assert match.num_blocks("b", Tier.HOST) == 40 and match.num_blocks("nobody") == 0
    assert match.lengths.sum() == 270 + 120


def test_block_moves_between_tiers_and_is_gone_from_all_at_once():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:10])
    index.store("a", CHAIN[5:10], Tier.HOST)
    assert [lengths(index, CHAIN, tier)["a"] for tier in Tier] == [5, 10, 10]
    index.store("a", CHAIN[5:10], Tier.DISK)
    assert [lengths(index, CHAIN, tier)["a"] for tier in Tier] == [5, 5, 10]
    index.store("a", CHAIN[5:7], Tier.DEVICE)
    assert [lengths(index, CHAIN, tier)["a"] for tier in Tier] == [7, 7, 10]
    index.remove("a", CHAIN[5:10])
    assert [lengths(index, CHAIN, tier)["a"] for tier in Tier] == [5, 5, 5]
    assert len(index) == 5
    index.check_integrity()


def test_joined_hashes_are_taken_as_well():
    index = PrefixIndex(1000)
    index.store("a", join_hashes(CHAIN[:9]))
    index.remove("a", join_hashes(CHAIN[7:9]))
    index.touch(join_hashes(CHAIN[:7]))
    assert lengths(index, CHAIN) == {"a": 7}
    with pytest.raises(ValueError, match="17 bytes"):
        index.store("a", bytes(17))


def test_last_of_several_changes_counts():
    index = PrefixIndex(1000, max_pending=10_000)
    for _ in range(3):
        index.store("a", CHAIN[:8])
        index.remove("a", CHAIN[4:8])
        index.store("b", CHAIN[:8])
        index.remove("b", CHAIN[:8])
        index.store("c", CHAIN[:2], Tier.DISK)
        index.store("c", CHAIN[:2], Tier.HOST)
    index.flush()
    assert lengths(index, CHAIN) == {"a": 4, "c": 2}
    assert lengths(index, CHAIN, Tier.DEVICE) == {"a": 4}
    assert len(index) == 4
    index.check_integrity()


def test_what_waits_is_seen_after_a_flush():
    index = PrefixIndex(1000, max_pending=100)
    index.store("a", CHAIN[:50])
    assert lengths(index, CHAIN) == {} and index.num_pending == 50
    index.flush()
    assert lengths(index, CHAIN) == {"a": 50} and index.num_pending == 0


def test_flush_may_be_bounded(monkeypatch):
    set_batch(monkeypatch, 16)
    index = PrefixIndex(1000, max_pending=10_000)
    index.store("a", CHAIN)
    index.flush(40)
    assert index.num_pending == 160 == 200 - len(index)
    index.flush()
    assert lengths(index, CHAIN) == {"a": 200}
    index.check_integrity()


def test_too_many_waiting_changes_are_worked_off_without_a_flush(monkeypatch):
    set_batch(monkeypatch, 16)
    index = PrefixIndex(1000, max_pending=20)
    for number in range(2000):
        index.store("a", [block(number)])
        assert index.num_pending <= 20
    for number in range(200):
        index.slot_of(f"w{number}")
        index.remove_worker(f"w{number}")
        assert index.num_pending <= 20
    index.check_integrity()


def test_hole_in_the_chain_ends_an_exact_match():
    index = PrefixIndex(1000)
    index.store("a", CHAIN)
    index.store("b", CHAIN)
    index.remove("a", [CHAIN[7]])
    assert index.match_exactly(CHAIN).by_worker() == {"a": 7, "b": 200}
    # By halves it is found only where a probe falls on it.
    assert lengths(index, CHAIN)["b"] == 200
    assert lengths(index, CHAIN[:8]) == {"a": 7, "b": 8}
    index.store("a", [CHAIN[7]])
    assert index.match_exactly(CHAIN).by_worker()["a"] == 200


def test_removed_worker_takes_its_entries_along():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:10])
    index.store("b", CHAIN[:4])
    index.remove_worker("a")
    assert lengths(index, CHAIN) == {"b": 4}
    assert len(index) == 4 and index.num_blocks("a") == 0 and index.num_blocks("b") == 4
    index.remove_worker("a")
    index.remove_worker("b")
    index.flush()
    assert len(index) == 0
    index.check_integrity()


def test_slot_is_kept_until_the_worker_is_removed_and_clean_when_given_again():
    index = PrefixIndex(1000, max_pending=1000)
    slot = index.slot_of("a")
    index.store("a", CHAIN[:10])
    index.reset_worker("a", {})
    index.reset_worker("a", {Tier.DEVICE: CHAIN[:3], Tier.DISK: CHAIN[3:5]})
    index.flush()
    assert index.slot_of("a") == slot
    assert lengths(index, CHAIN) == {"a": 5} and lengths(index, CHAIN, Tier.DEVICE) == {"a": 3}
    index.remove_worker("a")
    assert index.slot_of("b") != slot, "it is not clean yet"
    index.flush()
    assert index.slot_of("c") == slot
    assert lengths(index, CHAIN) == {}
    index.check_integrity()


def test_snapshot_replaces_what_was_known():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:10])
    index.reset_worker("a", {Tier.DEVICE: CHAIN[:2]})
    assert lengths(index, CHAIN) == {"a": 2}


def test_more_workers_than_fit_in_a_word():
    index = PrefixIndex(1000)
    index.store("w0", CHAIN[:5])
    width = index.num_slots
    for number in range(150):
        index.store(f"w{number}", CHAIN[: number + 1], Tier(number % 3))
    assert index.num_slots > width
    assert lengths(index, CHAIN) == {f"w{n}": max(n + 1, 5 if not n else 0) for n in range(150)}
    for number in range(0, 150, 2):
        index.remove_worker(f"w{number}")
    assert lengths(index, CHAIN) == {f"w{n}": n + 1 for n in range(1, 150, 2)}


def test_widening_forgets_what_was_worked_out_for_narrow_rows():
    index = PrefixIndex(1000)
    index.store("w0", CHAIN[:9])
    index.store("w1", CHAIN[:4])
    assert lengths(index, CHAIN) == {"w0": 9, "w1": 4}
    for number in range(2, 80):
        index.slot_of(f"w{number}")
    index.store("w64", CHAIN[:9])
    index.store("w1", CHAIN[:9])
    index.remove("w1", CHAIN[4:9])
    assert lengths(index, CHAIN) == {"w0": 9, "w1": 4, "w64": 9}
    index.check_integrity()


def test_too_many_workers_are_refused(monkeypatch):
    monkeypatch.setattr(prefix_index_module, "MAX_SLOTS", 2)
    index = PrefixIndex(10)
    index.slot_of("a")
    index.slot_of("b")
    with pytest.raises(ValueError, match="more than 2 workers"):
        index.slot_of("c")
    index.remove_worker("a")
    index.flush()
    assert index.slot_of("c") == 0


@pytest.mark.parametrize("bound", [0, -1, 1 << 40])
def test_bound_out_of_range_is_refused(bound):
    with pytest.raises(ValueError, match="max_entries"):
        PrefixIndex(bound)


def test_bound_drops_the_ends_of_used_chains_first():
    index = PrefixIndex(1000)
    chains = [[block(1000 * c + i) for i in range(100)] for c in range(20)]
    for chain in chains:
        index.store("a", chain)
        index.flush()
        index.touch(chains[0])
    index.check_integrity()
    assert len(index) == 1000
    assert lengths(index, chains[0]) == {"a": 100}
    assert not any(lengths(index, chain) for chain in chains[1:10])
    assert all(lengths(index, chain) == {"a": 100} for chain in chains[-8:])


def test_bound_holds_under_any_load():
    rng = random.Random(3)
    index = PrefixIndex(500, max_pending=256)
    for step in range(300):
        index.store(f"w{step % 5}", [block(rng.randrange(10**9)) for _ in range(rng.randrange(99))])
        index.flush()
        assert len(index) <= 500
    index.check_integrity()
    assert len(index) == 500


def test_recency_outlasts_the_clock(monkeypatch):
    monkeypatch.setattr(prefix_table_module, "CLOCK_LIMIT", 5000)
    index = PrefixIndex(400)
    for number in range(1, 101):
        index.store("a", [block(1000 * number + i) for i in range(100)])
        index.touch(CHAIN[:50])
        index.store("b", CHAIN[:50])
        index.check_integrity()
    assert lengths(index, CHAIN) == {"b": 50}
    assert lengths(index, [block(100_000 + i) for i in range(100)]) == {"a": 100}


def test_unknown_removals_are_ignored():
    index = PrefixIndex(10)
    index.remove("a", CHAIN[:3])
    index.store("a", CHAIN[:1])
    index.remove("a", CHAIN[:3])
    index.flush()
    assert len(index) == 0
    index.check_integrity()


def test_hash_that_looks_like_a_free_place():
    index = PrefixIndex(100)
    zero = bytes(16)
    assert lengths(index, [zero]) == {}
    index.store("a", [zero, CHAIN[0]])
    assert lengths(index, [zero]) == {"a": 1}
    index.remove("a", [zero])
    assert lengths(index, [zero]) == {} and len(index) == 1


def test_tag_found_across_two_neighbours_is_not_taken_for_a_match():
    # An odd number of buckets, so that every tag has a hash for every bucket.
    index = PrefixIndex(25)
    table = index._table
    assert table.num_buckets % 2
    index.store("a", CHAIN)
    index.flush()
    for bucket in range(table.num_buckets):
        data = table._tag_bytes[64 * bucket : 64 * bucket + 64]
        for offset in (1, 2, 3, 17, 34):
            low = bytes(data[offset : offset + 4])
            base = int.from_bytes(low, "little")
            number = next(
                n for n in range(base, base + (table.num_buckets << 32), 1 << 32)
                if n % table.num_buckets == bucket
            )  # fmt: skip
            stranger = number.to_bytes(8, "little") + number.to_bytes(8, "little")
            assert lengths(index, [stranger]) == {}


def test_change_is_looked_for_where_it_was_last():
    """Prompts with one beginning mostly part at its end, and a conversation ends where it did."""
    index = PrefixIndex(2000)
    table, num_rows = index._table, 0
    row_of = table.row

    def counted(block_hash):
        nonlocal num_rows
        num_rows += 1
        return row_of(block_hash)

    table.row = counted
    chains = [CHAIN[:70] + [block(1000 * n + i) for i in range(300)] for n in range(1, 3)]
    for worker in "abc":
        index.store(worker, CHAIN[:70])
    index.store("a", chains[0][:200])
    index.store("b", chains[1][:250])

    def rows_read(chain, expected):
        nonlocal num_rows
        num_rows = 0
        assert lengths(index, chain) == expected
        return num_rows

    first = rows_read(chains[0], {"a": 200, "b": 70, "c": 70})
    assert rows_read(chains[1], {"a": 70, "b": 250, "c": 70}) < first
    assert rows_read(chains[0], {"a": 200, "b": 70, "c": 70}) == 6
    # Where it has moved, it is found as well.
    index.store("a", chains[0][200:230])
    index.remove("c", CHAIN[33:70])
    assert rows_read(chains[0], {"a": 230, "b": 70, "c": 33}) > 6
    assert rows_read(chains[0], {"a": 230, "b": 70, "c": 33}) == 8


def test_places_of_changes_are_remembered_of_a_bounded_number(monkeypatch):
    monkeypatch.setattr(prefix_index_module, "MAX_RUN_ENDS", 8)
    index = PrefixIndex(2000)
    for number in range(50):
        chain = [block(1000 * number + i) for i in range(4)]
        index.store("a", chain[:3])
        assert lengths(index, chain) == {"a": 3}
        assert len(index._run_ends) <= 9


@pytest.mark.parametrize("num_changes", [1, 5, 39, 120])
def test_many_different_lengths_are_all_found(num_changes):
    index = PrefixIndex(5000)
    chain = [block(i) for i in range(512)]
    rng = random.Random(num_changes)
    expected = {f"w{n}": rng.randrange(1, 513) for n in range(num_changes)}
    for worker, length in expected.items():
        index.store(worker, chain[:length])
    assert lengths(index, chain) == expected
    assert index.match_exactly(chain).by_worker() == expected


class NaiveIndex:
    """Worker -> block -> tier, without a bound."""

    def __init__(self) -> None:
        self.held: dict[str, dict[bytes, Tier]] = {}

    def store(self, worker: str, hashes: list[bytes], tier: Tier) -> None:
        self.held.setdefault(worker, {}).update(dict.fromkeys(hashes, tier))

    def remove(self, worker: str, hashes: list[bytes]) -> None:
        for h in hashes:
            self.held.get(worker, {}).pop(h, None)

    def match(self, hashes: list[bytes], tier: Tier) -> dict[str, int]:
        lengths = {}
        for worker, held in self.held.items():
            n = 0
            while n < len(hashes) and held.get(hashes[n], 9) <= tier:
                n += 1
            if n:
                lengths[worker] = n
        return lengths


@pytest.mark.parametrize("seed", [0, 1])
def test_random_walk_agrees_with_a_naive_model(seed, monkeypatch):
    set_batch(monkeypatch, 50)
    monkeypatch.setattr(prefix_table_module, "CLOCK_LIMIT", 20_000)
    rng = random.Random(seed)
    index, naive = PrefixIndex(400), NaiveIndex()
    workers = [f"w{i}" for i in range(70)]
    chains = [[block(1000 * c + i) for i in range(20)] for c in range(10)]
    for step in range(10_000):
        worker, chain = rng.choice(workers), rng.choice(chains)
        tier = rng.choice(list(Tier))
        low = rng.randrange(20)
        part = chain[low : low + rng.randrange(1, 12)]
        action = rng.random()
        if action < 0.4:
            index.store(worker, part, tier)
            naive.store(worker, part, tier)
        elif action < 0.5:
            index.store(worker, chain[: low + 1], tier)
            naive.store(worker, chain[: low + 1], tier)
        elif action < 0.8:
            index.remove(worker, part)
            naive.remove(worker, part)
        elif action < 0.9:
            index.touch(chain)
        elif action < 0.95:
            index.remove_worker(worker)
            naive.held.pop(worker, None)
        else:
            index.reset_worker(worker, {tier: part})
            naive.held.pop(worker, None)
            naive.store(worker, part, tier)
        if step % 7 == 0:
            probe = rng.choice(chains)
            match = index.match_exactly(probe)
            for tier in Tier:
                assert match.by_worker(tier) == naive.match(probe, tier), step
        if step % 50 == 0:
            index.check_integrity()
            assert len(index) == len(set().union(*naive.held.values()))
    for worker in workers:
        index.remove_worker(worker)
    index.check_integrity()
    assert len(index) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_random_walk_beyond_the_bound_claims_nothing_that_is_not_held(seed, monkeypatch):
    set_batch(monkeypatch, 64)
    monkeypatch.setattr(prefix_table_module, "MIN_SWEEP_PLACES", 32)
    rng = random.Random(seed)
    index, naive = PrefixIndex(150, max_pending=1), NaiveIndex()
    workers = [f"w{i}" for i in range(5)]
    chains = [[block(1000 * c + i) for i in range(40)] for c in range(12)]
    for step in range(10_000):
        worker, chain = rng.choice(workers), rng.choice(chains)
        end = rng.randrange(41)
        action = rng.random()
        if action < 0.5:
            index.store(worker, chain[:end])
            naive.store(worker, chain[:end], Tier.DEVICE)
        elif action < 0.8:
            index.remove(worker, chain[end:])
            naive.remove(worker, chain[end:])
        elif action < 0.98:
            index.touch(chain[:end])
        else:
            index.remove_worker(worker)
            naive.held.pop(worker, None)
        if rng.random() < 0.2:
            index.flush()
            assert len(index) <= 150
            exact = naive.match(chain, Tier.DISK)
            for worker, length in index.match_exactly(chain).by_worker().items():
                assert 0 < length <= exact[worker]
        if step % 50 == 0:
            index.check_integrity()
    index.check_integrity()


@pytest.mark.parametrize("seed", range(3))
def test_search_equals_the_exact_walk_while_children_leave_before_parents(seed):
    rng = random.Random(seed)
    index = PrefixIndex(5000)
    chains = [[block(1000 * c + i) for i in range(60)] for c in range(5)]
    depth = {(w, c, t): 0 for w in range(9) for c in range(5) for t in range(3)}
    for _ in range(400):
        w, c = rng.randrange(9), rng.randrange(5)
        ends = sorted(rng.randrange(61) for _ in range(3))
        index.remove(f"w{w}", chains[c])
        for tier in reversed(Tier):
            index.store(f"w{w}", chains[c][: ends[tier]], tier)
            depth[w, c, tier] = ends[tier]
        found = index.match(chains[c])
        assert np.array_equal(found.lengths, index.match_exactly(chains[c]).lengths)
        for (worker, chain, tier), end in depth.items():
            if chain == c:
                assert found.num_blocks(f"w{worker}", Tier(tier)) == end


def test_integrity_check_finds_what_is_wrong():
    index = PrefixIndex(100)
    index.store("a", CHAIN[:9])
    index.check_integrity()
    index._table._rows[:] = 0
    with pytest.raises(AssertionError, match="row without a tag"):
        index.check_integrity()
