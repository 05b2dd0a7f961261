"""Blocks that come from elsewhere before a request asks for them, and prefixes lent to others."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from baton.core.block import chain_hashes
from baton.core.errors import InvalidRequest, NotFound
from baton.core.request import Work

Make = Callable[..., Any]
PROMPT = [(5 + 13 * i) % 97 for i in range(22)]


@pytest.fixture
def hashes(harness: ModuleType) -> list[Any]:
    """Of the five full blocks of PROMPT."""
    return chain_hashes(harness.ROOT, PROMPT, 4)


def cache(h: Any, num_tokens: int = len(PROMPT), name: str = "w") -> None:
    """Leave the blocks of the prompt's first tokens in the cache."""
    h.submit(name, PROMPT[:num_tokens], max_tokens=1)
    h.run()


def fetch(owner: Any, reader: Any, hashes: list[Any], name: str = "f") -> int:
    """What a reader does with a peer's cache; returns the number of blocks that became valid."""
    reservation = reader.engine.reserve_import(name, hashes)
    sources = owner.engine.lease_prefix(name, hashes)
    reader.copy(owner, sources[: len(reservation.block_ids)], reservation)
    num_blocks = min(len(sources), len(reservation.block_ids))
    reader.engine.finish_import(name, num_blocks=num_blocks)
    owner.engine.release_lease(name)
    return num_blocks


def test_imported_prefix_is_hit_and_gives_the_same_tokens(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, hashes: list[Any]
) -> None:
    owner, reader = make_harness(), make_harness()
    cache(owner)
    assert fetch(owner, reader, hashes) == 5
    assert reader.engine.has_work
    assert reader.step().stored == hashes
    assert not reader.engine.has_work
    reader.submit("a", PROMPT, max_tokens=6)
    reader.run()
    assert reader.records["a"].last.num_cached_tokens == 20
    assert reader.records["a"].token_ids == expected_output(PROMPT, 6)
    assert_engine_empty(owner.engine)
    assert_engine_empty(reader.engine)


def test_import_continues_what_is_cached_and_keeps_it_meanwhile(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, hashes: list[Any]
) -> None:
    owner, reader = make_harness(), make_harness(num_blocks=9)
    cache(owner)
    cache(reader, 8)
    reservation = reader.engine.reserve_import("f", hashes)
    assert reservation.num_cached_blocks == 2
    assert len(reservation.block_ids) == 5
    assert reader.engine.load().reservations == 1
    # Everything else is used, and no held block is evicted.
    reader.submit("other", [1] * 14, max_tokens=1)
    reader.run()
    reader.copy(owner, owner.engine.lease_prefix("f", hashes), reservation)
    reader.engine.finish_import("f", num_blocks=5)
    owner.engine.release_lease("f")
    reader.submit("a", PROMPT, max_tokens=4)
    reader.run()
    assert reader.records["a"].last.num_cached_tokens == 20
    assert reader.records["a"].token_ids == expected_output(PROMPT, 4)
    assert_engine_empty(reader.engine)


def test_only_what_is_valid_becomes_cached(
    make_harness: Make, assert_engine_empty: Make, hashes: list[Any]
) -> None:
    h = make_harness(num_blocks=8)
    for num_blocks in (0, 3):
        reservation = h.engine.reserve_import("f", hashes)
        h.runner.write_blocks(reservation.block_ids, [[0] * 4] * 5)
        h.engine.finish_import("f", num_blocks=num_blocks)
        h.check()
        assert h.engine.cached_hashes() == hashes[:num_blocks]
    assert h.engine.reserve_import("f", hashes[:3]) is None
    h.step()
    assert_engine_empty(h.engine)


def test_imported_blocks_are_evicted_from_their_end(make_harness: Make, hashes: list[Any]) -> None:
    h = make_harness(num_blocks=6)
    h.engine.reserve_import("f", hashes)
    h.engine.finish_import("f", num_blocks=5)
    h.submit("a", [1] * 9, max_tokens=1)
    h.run()
    assert [hash_ in h.engine.cached_hashes() for hash_ in hashes] == [True] * 3 + [False] * 2


def test_abandoned_import_quarantines_what_may_still_be_written(
    make_harness: Make, assert_engine_empty: Make, hashes: list[Any]
) -> None:
    h = make_harness(num_blocks=8)
    cache(h, 9)
    reservation = h.engine.reserve_import("f", hashes)
    unsettled = list(reservation.block_ids[3:])
    for wrong in (list(reservation.block_ids[:1]), [7, 7], unsettled * 2):
        with pytest.raises(InvalidRequest, match="does not read into"):
            h.engine.abandon_import("f", unsettled=wrong)
    h.engine.abandon_import("f", unsettled=unsettled)
    h.check()
    assert h.engine.load().quarantined_blocks == 2
    h.runner.write_blocks(unsettled, [[-9] * 4] * 2)
    h.engine.recover(unsettled)
    assert h.engine.cached_hashes() == hashes[:2]
    assert_engine_empty(h.engine)


def test_import_takes_as_many_as_fit_beside_running_and_waiting_sequences(
    make_harness: Make, expected_output: Make, hashes: list[Any]
) -> None:
    h = make_harness(num_blocks=12)
    h.submit("a", PROMPT[1:9], max_tokens=12)
    h.step()
    # 12 blocks, 2 for the prompt (and one that its next token may need), 2 kept back.
    reservation = h.engine.reserve_import("f", hashes)
    assert len(reservation.block_ids) == 5
    small = h.engine.reserve_import("g", chain_hashes(hashes[0], PROMPT, 4))
    num_left = h.engine._pool.num_available
    assert len(small.block_ids) + num_left + 5 + 2 == 12
    assert num_left >= 2
    h.engine.abandon_import("f", unsettled=())
    h.engine.abandon_import("g", unsettled=())
    h.submit("long", PROMPT, max_tokens=8)
    h.submit("longer", [*PROMPT, *PROMPT], max_tokens=1)
    # What the first in line wants is not taken from it.
    assert len(h.engine.reserve_import("f", hashes).block_ids) == 12 - 2 - 2 - 6
    h.engine.abandon_import("f", unsettled=())
    h.run()
    assert h.records["a"].token_ids == expected_output(PROMPT[1:9], 12)


def test_import_wakes_a_sequence_that_waits_for_its_blocks(
    make_harness: Make, expected_output: Make, hashes: list[Any]
) -> None:
    for end in ("finish", "abandon"):
        h = make_harness(num_blocks=7)
        h.engine.reserve_import("f", hashes)
        h.submit("a", PROMPT, max_tokens=2)
        h.run()
        assert h.engine.load().num_waiting == 1
        if end == "finish":
            h.engine.finish_import("f", num_blocks=0)
        else:
            h.engine.abandon_import("f", unsettled=())
        h.run()
        assert h.records["a"].token_ids == expected_output(PROMPT, 2)


def test_prompt_computed_meanwhile_stays_the_entry(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, hashes: list[Any]
) -> None:
    h = make_harness()
    reservation = h.engine.reserve_import("f", hashes)
    cache(h)
    h.runner.write_blocks(reservation.block_ids, [[0] * 4] * 5)
    h.engine.finish_import("f", num_blocks=5)
    h.submit("a", PROMPT, max_tokens=3)
    h.run()
    assert h.records["a"].token_ids == expected_output(PROMPT, 3)
    assert_engine_empty(h.engine)


def test_wrong_import_calls_are_refused_and_change_nothing(
    make_harness: Make, hashes: list[Any]
) -> None:
    h = make_harness()
    assert h.engine.reserve_import("f", []) is None
    h.engine.reserve_import("f", hashes)
    with pytest.raises(InvalidRequest, match="exists already"):
        h.engine.reserve_import("f", hashes)
    for num_blocks in (-1, 6):
        with pytest.raises(InvalidRequest, match="cannot be valid"):
            h.engine.finish_import("f", num_blocks=num_blocks)
    assert not h.engine.is_empty
    h.engine.finish_import("f", num_blocks=5)
    for end in (
        lambda: h.engine.finish_import("f", num_blocks=0),
        lambda: h.engine.abandon_import("f", unsettled=()),
    ):
        with pytest.raises(NotFound, match="does not exist"):
            end()
    h.check()


def test_engine_without_a_prefix_cache_imports_and_lends_nothing(
    make_harness: Make, hashes: list[Any]
) -> None:
    h = make_harness(enable_prefix_caching=False)
    cache(h)
    assert h.engine.reserve_import("f", hashes) is None
    assert h.engine.lease_prefix("f", hashes) == ()
    assert h.engine.is_empty


def test_lent_prefix_stays_while_everything_else_is_evicted(
    make_harness: Make, fake_runner: ModuleType, assert_engine_empty: Make, hashes: list[Any]
) -> None:
    h = make_harness(num_blocks=8)
    cache(h, 21)
    leased = h.engine.lease_prefix("f", [*hashes[:3], b"unknown", hashes[3]])
    assert len(leased) == 3
    assert h.engine.load().leases == 1
    for n in range(3):
        h.submit(f"o{n}", [n] * 14, max_tokens=2)
        h.run()
    stored = [v for values in h.runner.read_blocks(leased) for v in values]
    assert stored == fake_runner.fingerprints(PROMPT[:12])
    # It can be shared and leased again, as if it were not leased.
    assert h.engine.lease_prefix("g", hashes[:2]) == leased[:2]
    cache(h, 13, name="again")
    assert h.records["again"].last.num_cached_tokens == 12
    h.engine.release_lease("f")
    h.engine.release_lease("g")
    h.engine.release_lease("g")
    assert_engine_empty(h.engine)


def test_prefix_of_a_running_sequence_is_lent_and_outlives_it(
    make_harness: Make, assert_engine_empty: Make, hashes: list[Any]
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=20)
    while not h.records["a"].token_ids:
        h.step()
    assert len(h.engine.lease_prefix("f", hashes)) == 5
    h.engine.cancel("a")
    h.run()
    assert not h.engine.is_empty
    h.check()
    h.engine.release_lease("f")
    assert_engine_empty(h.engine)


def test_lease_ids_are_unique(make_harness: Make, hashes: list[Any]) -> None:
    h = make_harness()
    cache(h)
    assert h.engine.lease_prefix("none", [b"unknown"]) == ()
    assert h.engine.lease_prefix("none", hashes)
    with pytest.raises(InvalidRequest, match="exists already"):
        h.engine.lease_prefix("none", hashes)
    h.submit("p", PROMPT, work=Work.PREFILL)
    with pytest.raises(InvalidRequest, match="id of a request"):
        h.engine.lease_prefix("p", hashes)
    h.check()
