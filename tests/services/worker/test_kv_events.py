from __future__ import annotations

import random

import pytest

from baton.core.block import BlockHash
from baton.core.tier import Tier
from services.worker import kv_events as kv_events_module
from services.worker.kv_events import KvEvent, KvEventLog


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


A, B, C = block(1), block(2), block(3)


class Tiers:
    """Two sets with notes of what changed."""

    def __init__(self) -> None:
        self.host: set[BlockHash] = set()
        self.disk: set[BlockHash] = set()
        self.changes: dict[BlockHash, None] = {}
        self.is_watched = False

    @property
    def has_changes(self) -> bool:
        return bool(self.changes)

    def watch(self) -> None:
        self.is_watched = True

    def take_changes(self, max_blocks: int) -> list[BlockHash]:
        taken = list(self.changes)[:max_blocks]
        for block_hash in taken:
            del self.changes[block_hash]
        return taken

    def tier_of(self, block_hash: BlockHash) -> Tier | None:
        if block_hash in self.host:
            return Tier.HOST
        return Tier.DISK if block_hash in self.disk else None

    def held(self) -> tuple[list[BlockHash], list[BlockHash]]:
        return list(self.host), list(self.disk)

    def put(self, tier: Tier, block_hash: BlockHash) -> None:
        (self.host if tier is Tier.HOST else self.disk).add(block_hash)
        self.changes[block_hash] = None

    def drop(self, tier: Tier, block_hash: BlockHash) -> None:
        (self.host if tier is Tier.HOST else self.disk).discard(block_hash)
        self.changes[block_hash] = None


class Worker:
    """A pool's cached blocks, tiers, and what a router made of the events."""

    def __init__(self) -> None:
        self.cached: dict[BlockHash, None] = {}
        self.tiers = Tiers()
        self.log = KvEventLog(self.cached.__contains__)
        self.log.attach(self.tiers)
        self.known: dict[BlockHash, Tier] = {}
        self.numbers: list[int] = []
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    def store(self, block_hash: BlockHash) -> None:
        if block_hash not in self.cached:
            self.cached[block_hash] = None
            if self._removed.pop(block_hash, 0) == 0:
                self._stored[block_hash] = None

    def evict(self, block_hash: BlockHash) -> None:
        if block_hash in self.cached:
            del self.cached[block_hash]
            if self._stored.pop(block_hash, 0) == 0:
                self._removed[block_hash] = None

    def step(self) -> KvEvent | None:
        event = self.log.next_event(list(self._stored), list(self._removed))
        self._stored.clear()
        self._removed.clear()
        if event is not None:
            self.numbers.append(self.log.sequence)
            named = [*event.stored, *event.removed, *event.on_host, *event.on_disk]
            assert len(set(named)) == len(named) == event.num_hashes > 0
            self.apply(event, self.known)
        return event

    @staticmethod
    def apply(event: KvEvent, known: dict[BlockHash, Tier]) -> None:
        for block_hash in event.removed:
            known.pop(block_hash, None)
        for tier, part in zip(Tier, (event.stored, event.on_host, event.on_disk), strict=True):
            known.update(dict.fromkeys(part, tier))

    @property
    def truth(self) -> dict[BlockHash, Tier]:
        best = dict.fromkeys(self.tiers.disk, Tier.DISK)
        best |= dict.fromkeys(self.tiers.host, Tier.HOST)
        return best | dict.fromkeys(self.cached, Tier.DEVICE)

    def snapshot(self) -> dict[BlockHash, Tier]:
        host, disk = self.log.below()
        parts = (list(self.cached), host, disk)
        assert not (set(host) & set(disk)) and not self.cached.keys() & {*host, *disk}
        return {h: tier for tier, part in zip(Tier, parts, strict=True) for h in part}


def test_evicted_block_is_told_where_it_can_be_restored_from():
    worker = Worker()
    assert worker.tiers.is_watched
    for block_hash in (A, B, C):
        worker.store(block_hash)
    assert worker.step() == KvEvent([A, B, C])
    worker.tiers.put(Tier.HOST, A)
    worker.tiers.put(Tier.DISK, B)
    assert worker.step() is None, "both are better where they are"
    for block_hash in (A, B, C):
        worker.evict(block_hash)
    assert worker.step() == KvEvent([], [C], [A], [B])
    assert worker.log.sequence == 2


def test_block_goes_down_the_tiers_and_is_gone_in_the_end():
    worker = Worker()
    worker.tiers.put(Tier.HOST, A)
    assert worker.step() == KvEvent([], [], [A])
    worker.tiers.put(Tier.DISK, A)
    worker.tiers.drop(Tier.HOST, A)
    assert worker.step() == KvEvent([], [], [], [A])
    worker.store(A)
    assert worker.step() == KvEvent([A])
    worker.tiers.drop(Tier.DISK, A)
    assert worker.step() is None
    worker.evict(A)
    assert worker.step() == KvEvent([], [A])


def test_no_news_has_no_number():
    worker = Worker()
    assert worker.step() is None and worker.log.sequence == 0
    plain = KvEventLog(lambda _: False)
    assert plain.next_event([], []) is None and plain.below() == ([], [])
    assert plain.next_event([A], [B]) == KvEvent([A], [B]) and plain.sequence == 1


def test_many_changes_are_spread_over_events(monkeypatch):
    monkeypatch.setattr(kv_events_module, "MAX_TIER_CHANGES", 10)
    worker = Worker()
    for number in range(25):
        worker.tiers.put(Tier.DISK, block(number))
    sizes = []
    while (event := worker.step()) is not None:
        sizes.append(event.num_hashes)
    assert sizes == [10, 10, 5] and worker.known == worker.truth


@pytest.mark.parametrize("seed", [0, 1])
def test_router_knows_the_best_tier_after_any_walk(seed, monkeypatch):
    monkeypatch.setattr(kv_events_module, "MAX_TIER_CHANGES", 7)
    rng = random.Random(seed)
    worker = Worker()
    names = [block(number) for number in range(40)]
    late: dict[BlockHash, Tier] | None = None
    for _ in range(10_000):
        block_hash, tier = rng.choice(names), rng.choice((Tier.HOST, Tier.DISK))
        match rng.randrange(6):
            case 0:
                worker.store(block_hash)
            case 1:
                worker.evict(block_hash)
            case 2:
                worker.tiers.put(tier, block_hash)
            case 3:
                worker.tiers.drop(tier, block_hash)
            case 4 if not worker._stored and not worker._removed:
                # A router that connects now; between steps nothing of the pool is untold.
                late = worker.snapshot()
                assert late == worker.truth
            case _:
                event = worker.step()
                if event is not None and late is not None:
                    worker.apply(event, late)
    assert late is not None
    while (event := worker.step()) is not None:
        worker.apply(event, late)
    assert worker.known == worker.truth == late
    assert worker.numbers == list(range(1, len(worker.numbers) + 1))
    assert worker.snapshot() == worker.known
