"""Cached blocks that a tier copies before they are evicted."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from baton.core.block import chain_hashes
from baton.core.errors import NotFound

Make = Callable[..., Any]


def prompt(n: int) -> list[int]:
    """Of two full blocks and one token."""
    return [(n + 13 * i) % 97 for i in range(9)]


def cache(h: Any, n: int) -> None:
    name = f"w{n}.{h.num_steps}"
    h.submit(name, prompt(n), max_tokens=1)
    h.run()


@pytest.fixture
def hashes(harness: ModuleType) -> Callable[[int], list[Any]]:
    return lambda n: chain_hashes(harness.ROOT, prompt(n), 4)


def save(h: Any, max_blocks: int, *, is_saved: bool = True) -> list[Any]:
    taken = h.engine.take_unsaved(max_blocks)
    h.check()
    h.engine.release_saved([block_id for _, block_id in taken], is_saved=is_saved)
    h.check()
    return [block_hash for block_hash, _ in taken]


def test_coldest_come_first_and_each_once(make_harness: Make, hashes: Make) -> None:
    h = make_harness()
    for n in range(4):
        cache(h, n)
    # A sequence's end is evicted before its beginning.
    order = [hash_ for n in range(4) for hash_ in reversed(hashes(n))]
    assert save(h, 3) == order[:3]
    assert save(h, 2) == order[3:5]
    assert save(h, 99) == order[5:]
    assert save(h, 99) == []


def test_saved_blocks_keep_their_place_in_the_order_of_eviction(
    make_harness: Make, hashes: Make
) -> None:
    h = make_harness(num_blocks=12)
    for n in range(4):
        cache(h, n)
    save(h, 3)
    order = [hash_ for n in range(4) for hash_ in reversed(hashes(n))]
    for num_evicted in range(8):
        assert set(order[num_evicted:]) == set(h.engine.cached_hashes())
        h.engine._pool.allocate(5 if num_evicted == 0 else 1)


def test_what_could_not_be_saved_is_offered_again_in_its_place(
    make_harness: Make, hashes: Make
) -> None:
    h = make_harness()
    cache(h, 0)
    cache(h, 1)
    first = save(h, 2, is_saved=False)
    assert save(h, 2) == first == hashes(0)[::-1]
    assert save(h, 9) == hashes(1)[::-1]


def test_block_used_while_it_is_saved_is_warm_afterwards(make_harness: Make, hashes: Make) -> None:
    h = make_harness()
    cache(h, 0)
    cache(h, 1)
    taken = h.engine.take_unsaved(2)
    cache(h, 0)
    h.engine.release_saved([b for _, b in taken], is_saved=False)
    h.check()
    assert save(h, 9) == [*hashes(1)[::-1], *hashes(0)[::-1]]


def test_block_that_was_used_again_is_offered_again(make_harness: Make, hashes: Make) -> None:
    """The tier may have dropped its copy meanwhile, which nobody used; of a block that is used
    all the time that is the likeliest, and it is worth most."""
    h = make_harness()
    cache(h, 0)
    cache(h, 1)
    assert len(save(h, 9)) == 4
    cache(h, 0)
    assert save(h, 9) == hashes(0)[::-1]
    assert save(h, 9) == []


def test_block_lent_while_it_is_saved_ends_both_leases_in_any_order(
    make_harness: Make, hashes: Make, assert_engine_empty: Make
) -> None:
    for is_saved_first in (True, False):
        h = make_harness()
        cache(h, 0)
        taken = [b for _, b in h.engine.take_unsaved(9)]
        assert set(h.engine.lease_prefix("f", hashes(0))) == set(taken)
        ends = [
            lambda h=h, taken=taken: h.engine.release_saved(taken, is_saved=True),
            lambda h=h: h.engine.release_lease("f"),
        ]
        for end in ends if is_saved_first else ends[::-1]:
            end()
            h.check()
        assert save(h, 9) == []
        assert_engine_empty(h.engine)


def test_mark_goes_with_the_block(make_harness: Make, hashes: Make) -> None:
    h = make_harness(num_blocks=6)
    cache(h, 0)
    assert len(save(h, 9)) == 2
    for n in range(1, 5):
        cache(h, n)
    assert not set(hashes(0)) & set(h.engine.cached_hashes())
    cache(h, 0)
    offered: list[Any] = []
    while taken := save(h, 9):
        offered += taken
    assert set(hashes(0)) <= set(offered)


def test_half_of_what_sequences_could_take_is_left_to_them(
    make_harness: Make, expected_output: Make
) -> None:
    h = make_harness(num_blocks=8)
    for n in range(4):
        cache(h, n)
    taken = h.engine.take_unsaved(99)
    assert len(taken) == 4
    assert h.engine.is_empty
    assert len(h.engine.take_unsaved(99)) == 2
    h.submit("a", prompt(7)[:5], max_tokens=3)
    h.run()
    assert h.records["a"].token_ids == expected_output(prompt(7)[:5], 3)


def test_sequence_that_waits_for_blocks_gets_them_back_from_the_tier(
    make_harness: Make, expected_output: Make
) -> None:
    h = make_harness(num_blocks=8)
    for n in range(4):
        cache(h, n)
    taken = [b for _, b in h.engine.take_unsaved(99)]
    long = [3] * 22
    h.submit("a", long, max_tokens=2)
    h.run()
    assert h.engine.load().num_waiting == 1
    h.engine.release_saved(taken, is_saved=True)
    h.run()
    assert h.records["a"].token_ids == expected_output(long, 2)


def test_blocks_that_were_not_taken_are_refused(make_harness: Make) -> None:
    h = make_harness()
    cache(h, 0)
    (_, first), (_, second) = h.engine.take_unsaved(2)
    for wrong in ([first, 31], [first, first]):
        with pytest.raises(NotFound, match="not all being saved"):
            h.engine.release_saved(wrong, is_saved=True)
    h.check()
    h.engine.release_saved([first, second], is_saved=True)
    with pytest.raises(NotFound):
        h.engine.release_saved([first], is_saved=True)


def test_taking_costs_nothing_where_all_is_saved(make_harness: Make) -> None:
    """However many blocks are cached: the row of unsaved ones is empty."""
    h = make_harness(num_blocks=256)
    for n in range(40):
        cache(h, n)
    assert len(save(h, 999)) == 80
    h.engine._pool._blocks = None
    assert h.engine.take_unsaved(999) == []
