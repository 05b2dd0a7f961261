"""Quarantine: both orders of "held" and "settled"."""

from __future__ import annotations

import random

from baton.core.block import BlockId
from kvtransfer.quarantine import Quarantine


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(n) for n in numbers]


def test_held_blocks_are_freed_when_settled_once():
    q = Quarantine()
    assert q.hold(ids(1, 2)) == [1, 2]
    assert BlockId(1) in q and len(q) == 2
    assert q.settle(ids(2)) == [2]
    assert q.settle(ids(1)) == [1]
    assert q.is_empty


def test_block_settled_first_is_never_held():
    q = Quarantine()
    assert q.settle(ids(3)) == []
    assert not q.is_empty
    assert q.hold(ids(3, 4)) == [4]
    assert q.settle(ids(4)) == [4]
    assert q.is_empty


def test_block_held_twice_needs_two_settlements():
    q = Quarantine()
    q.hold(ids(1))
    q.hold(ids(1))
    assert q.settle(ids(1)) == []
    assert q.settle(ids(1)) == [1]


def test_random_walk_frees_each_hold_exactly_once():
    rng = random.Random(11)
    q = Quarantine()
    to_hold, to_settle, held = [], [], set()
    for step in range(10_000):
        roll = rng.random()
        if roll < 0.34:
            block = BlockId(step)
            to_hold.append(block)
            to_settle.append(block)
        elif roll < 0.67 and to_hold:
            block = to_hold.pop(rng.randrange(len(to_hold)))
            if q.hold([block]):
                held.add(block)
            else:
                assert block not in to_settle
        elif to_settle:
            block = to_settle.pop(rng.randrange(len(to_settle)))
            freed = q.settle([block])
            assert freed == ([block] if block in held else [])
            held.difference_update(freed)
        assert len(q) == len(held)
        q.check_integrity()
    q.settle(to_settle)
    q.hold(to_hold)
    assert q.is_empty
