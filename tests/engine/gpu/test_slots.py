"""Places of sequences on the device, over random steps."""

from __future__ import annotations

import random

import pytest

from baton.core.errors import InternalError
from baton.core.request import RequestId
from baton.engine.gpu.slots import SlotTable


def ids(*names: str) -> list[RequestId]:
    return [RequestId(name) for name in names]


def test_a_sequence_keeps_its_place_while_it_is_in_every_step() -> None:
    table = SlotTable(3)
    first = table.assign(ids("a", "b", "c"))
    second = table.assign(ids("c", "a"))
    assert second.slots == [first.slots[2], first.slots[0]]
    assert second.entered == []


def test_a_sequence_that_skipped_a_step_enters_again() -> None:
    table = SlotTable(2)
    table.assign(ids("a", "b"))
    table.assign(ids("b"))
    assert table.assign(ids("a", "b")).entered == [0]


def test_more_sequences_than_places_is_our_own_error() -> None:
    with pytest.raises(InternalError, match="step of 3 sequences"):
        SlotTable(2).assign(ids("a", "b", "c"))


def test_places_are_distinct_and_stable_over_a_random_walk() -> None:
    rng = random.Random(5)
    table, other_rank = SlotTable(8), SlotTable(8)
    before: dict[RequestId, int] = {}
    for _ in range(10_000):
        step = [RequestId(str(i)) for i in rng.sample(range(20), rng.randint(1, 8))]
        assignment = table.assign(step)
        assert other_rank.assign(step) == assignment
        now = dict(zip(step, assignment.slots, strict=True))
        assert len(set(assignment.slots)) == len(step)
        assert all(0 <= slot < 8 for slot in assignment.slots)
        assert {step[i] for i in assignment.entered} == set(step) - set(before)
        assert all(before[r] == now[r] for r in step if r in before)
        before = now
