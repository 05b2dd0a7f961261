from __future__ import annotations

import random

import pytest

from services.router.prefix_index import PrefixIndex


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


CHAIN = [block(i) for i in range(200)]


def test_longest_match_per_worker():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:5])
    index.store("b", CHAIN[:9])
    index.store("c", CHAIN[1:9])
    assert index.match(CHAIN) == {"a": 5, "b": 9}
    assert index.match(CHAIN[:3]) == {"a": 3, "b": 3}
    assert index.match(CHAIN[100:]) == {} and index.match([]) == {}


def test_hole_in_the_chain_ends_the_match():
    index = PrefixIndex(1000)
    index.store("a", CHAIN)
    index.store("b", CHAIN)
    index.remove("a", [CHAIN[7]])
    assert index.match(CHAIN) == {"a": 7, "b": 200}
    index.store("a", [CHAIN[7]])
    assert index.match(CHAIN)["a"] == 200


def test_removed_worker_takes_its_entries_along():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:10])
    index.store("b", CHAIN[:4])
    index.remove_worker("a")
    assert index.match(CHAIN) == {"b": 4}
    assert len(index) == 4 and index.num_blocks("a") == 0
    index.remove_worker("a")
    index.remove_worker("b")
    assert len(index) == 0
    index.check_integrity()


def test_snapshot_replaces_what_was_known():
    index = PrefixIndex(1000)
    index.store("a", CHAIN[:10])
    index.reset_worker("a", CHAIN[:2])
    assert index.match(CHAIN) == {"a": 2}


def test_bound_drops_the_ends_of_used_chains_last_beginnings():
    index = PrefixIndex(100)
    index.store("a", CHAIN[:60])
    index.touch(CHAIN[:60])
    index.store("a", CHAIN[60:120])
    assert len(index) == 100
    # 20 entries had to go: the deepest of the touched chain.
    assert index.match(CHAIN[:60]) == {"a": 40}
    index.check_integrity()


def test_unknown_removals_are_ignored():
    index = PrefixIndex(10)
    index.remove("a", CHAIN[:3])
    index.store("a", CHAIN[:1])
    index.remove("a", CHAIN[:3])
    assert len(index) == 0
    index.check_integrity()


class NaiveIndex:
    """Worker -> set; recency as a list."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.held: dict[str, set[bytes]] = {}
        self.recency: list[bytes] = []

    def _use(self, h: bytes) -> None:
        if h in self.recency:
            self.recency.remove(h)
        self.recency.append(h)

    def store(self, worker: str, hashes: list[bytes]) -> None:
        self.held.setdefault(worker, set())
        for h in hashes:
            self._use(h)
            self.held[worker].add(h)
        while len(self.recency) > self.bound:
            gone = self.recency.pop(0)
            for held in self.held.values():
                held.discard(gone)

    def _sweep(self) -> None:
        alive = set().union(*self.held.values())
        self.recency = [h for h in self.recency if h in alive]

    def remove(self, worker: str, hashes: list[bytes]) -> None:
        self.held.get(worker, set()).difference_update(hashes)
        self._sweep()

    def remove_worker(self, worker: str) -> None:
        self.held.pop(worker, None)
        self._sweep()

    def touch(self, hashes: list[bytes]) -> None:
        for h in reversed(hashes):
            if h in self.recency:
                self._use(h)

    def match(self, hashes: list[bytes]) -> dict[str, int]:
        lengths = {}
        for worker, held in self.held.items():
            n = 0
            while n < len(hashes) and hashes[n] in held:
                n += 1
            if n:
                lengths[worker] = n
        return lengths


@pytest.mark.parametrize("seed", [0, 1])
def test_random_walk_agrees_with_a_naive_model(seed):
    rng = random.Random(seed)
    index, naive = PrefixIndex(60), NaiveIndex(60)
    workers = [f"w{i}" for i in range(7)]
    chains = [[block(1000 * c + i) for i in range(20)] for c in range(6)]
    for step in range(6000):
        worker, chain = rng.choice(workers), rng.choice(chains)
        low = rng.randrange(20)
        part = chain[low : low + rng.randrange(1, 12)]
        action = rng.random()
        if action < 0.4:
            index.store(worker, part)
            naive.store(worker, part)
        elif action < 0.5:
            index.store(worker, chain[: low + 1])
            naive.store(worker, chain[: low + 1])
        elif action < 0.8:
            index.remove(worker, part)
            naive.remove(worker, part)
        elif action < 0.9:
            index.touch(chain)
            naive.touch(chain)
        elif action < 0.95:
            index.remove_worker(worker)
            naive.remove_worker(worker)
        else:
            index.reset_worker(worker, part)
            naive.remove_worker(worker)
            naive.store(worker, part)
        index.check_integrity()
        assert list(index._masks) == naive.recency
        probe = rng.choice(chains)
        assert index.match(probe) == naive.match(probe), step
    for worker in workers:
        index.remove_worker(worker)
    assert len(index) == 0
