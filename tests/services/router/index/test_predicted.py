from __future__ import annotations

import random

import pytest

from baton.core.block import chain_hashes, join_hashes, root_hash
from baton.core.tier import Tier
from services.router.index.predicted import MAX_PER_KEY, PredictedPrefixes
from services.router.index.prefix_index import PrefixIndex

ROOT = root_hash("test")


def prompt(*tokens: int) -> tuple[bytes, ...]:
    """One block a token."""
    return tuple(chain_hashes(ROOT, tokens, 1))


def document(number: int, length: int) -> tuple[bytes, ...]:
    return prompt(number, *range(1000, 1000 + length - 1))


@pytest.fixture
def index():
    index = PrefixIndex(10_000)
    for worker in "abcd":
        index.slot_of(worker)
    return index


def test_sibling_finds_what_its_brother_was_sent(index):
    predicted = PredictedPrefixes(ttl_s=5)
    shared = tuple(range(70))
    predicted.note(prompt(*shared, 500, 501), "a", 0.0)
    sibling = prompt(*shared, 600, 601, 602)
    match = predicted.merge(index.match(sibling), sibling, 1.0)
    assert match.by_worker() == match.by_worker(Tier.DEVICE) == {"a": 70}
    again = prompt(*shared, 500, 501)
    assert predicted.merge(index.match(again), again, 1.0).by_worker() == {"a": 72}
    stranger = document(9, 80)
    assert predicted.merge(index.match(stranger), stranger, 1.0).by_worker() == {}


def test_lengths_are_raised_never_lowered(index):
    predicted = PredictedPrefixes()
    chain = document(1, 100)
    index.store("a", chain[:90])
    index.store("b", chain[:80], Tier.HOST)
    predicted.note(chain[:60], "a", 0.0)
    predicted.note(chain[:60], "b", 0.0)
    known = index.match(chain)
    match = predicted.merge(known, chain, 0.0)
    assert match.by_worker(Tier.DEVICE) == {"a": 90, "b": 60}
    assert match.by_worker() == {"a": 90, "b": 80}
    assert known.by_worker(Tier.DEVICE) == {"a": 90}, "the index's answer is left alone"


def test_prediction_ends_with_its_time(index):
    predicted = PredictedPrefixes(ttl_s=5)
    chain = document(1, 10)
    predicted.note(chain, "a", 0.0)
    predicted.note(join_hashes(chain[:5]), "b", 3.0)
    assert predicted.merge(index.match(chain), chain, 4.9).by_worker() == {"a": 10, "b": 5}
    assert predicted.merge(index.match(chain), chain, 5.0).by_worker() == {"b": 5}
    assert predicted.merge(index.match(chain), chain, 8.0).by_worker() == {}
    assert not len(predicted) and not predicted._by_key


def test_unknown_worker_and_empty_prompts_change_nothing(index):
    predicted = PredictedPrefixes()
    predicted.note((), "a", 0.0)
    predicted.note(document(1, 4), "never connected", 0.0)
    for chain in ((), document(1, 4)):
        assert predicted.merge(index.match(chain), chain, 0.0).by_worker() == {}


def test_bounds_hold_and_the_last_placements_stay(index):
    predicted = PredictedPrefixes(ttl_s=100, max_notes=10, max_blocks=64)
    for number in range(30):
        predicted.note(document(number, 4), "a", float(number))
        predicted.check_integrity()
    assert len(predicted) == 10
    predicted.note(document(99, 40), "a", 30.0)
    predicted.check_integrity()
    assert len(predicted) == 1 + (64 - 40) // 4
    predicted.note(document(100, 65), "a", 30.0)
    assert len(predicted) == 7, "larger than all there may be"
    chain = document(99, 40)
    assert predicted.merge(index.match(chain), chain, 31.0).by_worker() == {"a": 40}


def test_crowd_with_one_beginning_keeps_its_last_members(index):
    predicted = PredictedPrefixes(ttl_s=100)
    for number in range(100):
        predicted.note(prompt(1, 2, 3, 100 + number), "abcd"[number % 4], 0.0)
    predicted.check_integrity()
    assert len(predicted._by_key[prompt(1)[0]]) == MAX_PER_KEY
    chain = prompt(1, 2, 3, 4)
    assert predicted.merge(index.match(chain), chain, 0.0).by_worker() == dict.fromkeys("abcd", 3)


@pytest.mark.parametrize("ttl_s", [0, -1])
def test_time_to_live_must_be_positive(ttl_s):
    with pytest.raises(ValueError, match="ttl_s"):
        PredictedPrefixes(ttl_s)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_walk_agrees_with_a_list_of_placements(seed, index):
    rng = random.Random(seed)
    predicted = PredictedPrefixes(ttl_s=3)
    placed: list[tuple[float, str, tuple[bytes, ...]]] = []
    trunk = [rng.randrange(100) for _ in range(40)]
    now_s = 0.0
    for _ in range(10_000):
        now_s += rng.choice((0.0, 0.3))
        tokens = trunk[: rng.randrange(41)] + [rng.randrange(3) for _ in range(rng.randrange(4))]
        chain = prompt(*tokens)
        if rng.random() < 0.3:
            worker = rng.choice("abcd")
            predicted.note(chain, worker, now_s)
            placed.append((now_s + 3, worker, chain))
            continue
        placed = [p for p in placed if p[0] > now_s]
        exact = {}
        for _, worker, other in placed:
            common = sum(1 for a, b in zip(chain, other, strict=False) if a == b)
            if common:
                exact[worker] = max(common, exact.get(worker, 0))
        found = predicted.merge(index.match(chain), chain, now_s).by_worker()
        predicted.check_integrity()
        assert found.keys() <= exact.keys()
        for worker, length in found.items():
            # Crowded keys forget older placements, which may have had more in common.
            assert length <= exact[worker]
            if len(placed) <= MAX_PER_KEY:
                assert length == exact[worker]
        if len(placed) <= MAX_PER_KEY:
            assert found == exact
