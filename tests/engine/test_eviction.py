import random

import pytest

from baton.engine.eviction import EvictionOrder


def drain(order):
    evicted = []
    while len(order):
        evicted.append(order.coldest())
        order.discard(evicted[-1])
    return evicted


def save_one(order):
    block_id = order.coldest_unsaved()
    order.discard(block_id)
    return block_id


def test_block_saved_later_is_not_evicted_before_those_saved_earlier():
    order = EvictionOrder()
    for block_id in (1, 2):
        order.add(block_id, is_saved=False, is_cold=False)
        order.add(save_one(order), is_saved=True, is_cold=True)
    order.add(3, is_saved=False, is_cold=False)
    assert drain(order) == [1, 2, 3]


def test_block_used_again_is_warm():
    order = EvictionOrder()
    for block_id in (1, 2, 3):
        order.add(block_id, is_saved=False, is_cold=False)
    order.discard(1)
    order.add(1, is_saved=True, is_cold=False)
    assert drain(order) == [2, 3, 1]


@pytest.mark.parametrize("seed", range(3))
def test_random_walk_keeps_the_order_of_use(seed):
    rng = random.Random(seed)
    order = EvictionOrder()
    used: list[int] = []
    """Cached blocks, least recently used first; those being saved keep their place."""
    saved: set[int] = set()
    taken: set[int] = set()
    for _ in range(10_000):
        action = rng.choice(["use", "use", "evict", "take", "give back"])
        cached = [b for b in used if b not in taken]
        if action == "use":
            block_id = rng.randrange(24)
            if block_id in taken:
                continue
            if block_id in used:
                order.discard(block_id)
                used.remove(block_id)
            else:
                saved.discard(block_id)
            order.add(block_id, is_saved=block_id in saved, is_cold=False)
            used.append(block_id)
        elif action == "evict" and cached:
            assert order.coldest() == cached[0]
            order.discard(cached[0])
            used.remove(cached[0])
        elif action == "take" and order.num_unsaved:
            block_id = order.coldest_unsaved()
            assert block_id == next(b for b in cached if b not in saved)
            order.discard(block_id)
            taken.add(block_id)
        elif action == "give back" and taken:
            block_id = rng.choice(sorted(taken))
            taken.discard(block_id)
            if rng.random() < 0.7:
                saved.add(block_id)
            order.add(block_id, is_saved=block_id in saved, is_cold=True)
        cached = [b for b in used if b not in taken]
        assert len(order) == len(cached)
        assert order.num_unsaved == sum(b not in saved for b in cached)
        assert order.has_laws(cached, [b for b in cached if b not in saved])
    assert drain(order) == [b for b in used if b not in taken]
