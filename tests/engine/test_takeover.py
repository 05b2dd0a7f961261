"""The reading side of a takeover: what is reserved, and what may come of it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from baton.core.errors import InvalidRequest
from baton.core.lifecycle import LifecycleEvent
from baton.core.request import FinishReason, RequestId, TokenDelta, Work
from baton.engine.scheduler import TAKEOVER_SLACK_TOKENS

Make = Callable[..., Any]
PROMPT = [(5 + 13 * i) % 97 for i in range(11)]


@pytest.fixture
def outputs(expected_output: Make) -> list[int]:
    """The whole output of PROMPT, as far as any test wants it."""
    return expected_output(PROMPT, 100)


def reserve(h: Any, outputs: list[int], num_known: int, **fields: Any) -> Any:
    fields = {"max_tokens": 100, **fields}
    known = tuple(outputs[:num_known])
    h.submit("a", PROMPT, work=Work.TAKEOVER, output_token_ids=known, **fields)
    h.step()
    return h.records["a"].reservation


def arrive(
    h: Any, fake_runner: ModuleType, outputs: list[int], num_known: int, num_more: int
) -> None:
    """Write the KV of all tokens but the last, and activate."""
    values = fake_runner.fingerprints([*PROMPT, *outputs[: num_known + num_more]])[:-1]
    reservation = h.records["a"].reservation
    for i in range(reservation.num_cached_blocks, -(-len(values) // 4)):
        block = values[4 * i : 4 * i + 4]
        h.runner.write_blocks([reservation.block_ids[i]], [block + [-1] * (4 - len(block))])
    more = outputs[num_known : num_known + num_more]
    h.engine.activate("a", TokenDelta(RequestId("a"), num_known, more))
    h.check()


@pytest.mark.parametrize("num_known", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("num_more", [0, 1, 2, 3, 7, TAKEOVER_SLACK_TOKENS])
def test_goes_on_from_the_last_token_however_many_came(
    make_harness: Make,
    fake_runner: ModuleType,
    outputs: list[int],
    assert_engine_empty: Make,
    num_known: int,
    num_more: int,
) -> None:
    h = make_harness()
    reservation = reserve(h, outputs, num_known, max_tokens=90)
    assert len(reservation.block_ids) == -(-(11 + num_known + TAKEOVER_SLACK_TOKENS) // 4)
    arrive(h, fake_runner, outputs, num_known, num_more)
    load = h.engine.load()
    # What was not needed is free again.
    assert load.free_blocks + load.cached_blocks == 32 - -(-(10 + num_known + num_more) // 4)
    h.run()
    deltas = h.records["a"].deltas
    assert deltas[0].first_index == num_known + num_more
    assert h.records["a"].token_ids == outputs[num_known + num_more : 90]
    timeline = h.records["a"].last.timeline
    assert LifecycleEvent.DECODE_RESERVED in timeline.points
    assert LifecycleEvent.PREFILL_QUEUED not in timeline.points
    assert_engine_empty(h.engine)


def test_slack_ends_at_the_longest_the_sequence_can_be(
    make_harness: Make, outputs: list[int]
) -> None:
    h = make_harness(num_blocks=8)
    assert len(reserve(h, outputs, 3, max_tokens=7).block_ids) == -(-18 // 4)
    h.engine.abandon("a", unsettled=())
    # A pool smaller than the slack can still take it alone.
    assert len(reserve(h, outputs, 3).block_ids) == 8


def test_ends_where_the_limit_is_reached_with_what_came(
    make_harness: Make, fake_runner: ModuleType, outputs: list[int], assert_engine_empty: Make
) -> None:
    h = make_harness()
    reserve(h, outputs, 3, max_tokens=6)
    arrive(h, fake_runner, outputs, 3, 3)
    h.run()
    assert h.records["a"].finish_reason is FinishReason.LENGTH
    assert h.records["a"].token_ids == []
    assert_engine_empty(h.engine)


def test_stops_at_a_stop_token_after_min_tokens(
    make_harness: Make, fake_runner: ModuleType, outputs: list[int]
) -> None:
    h = make_harness()
    stop = outputs[8]
    reserve(h, outputs, 2, stop_token_ids=(stop,))
    arrive(h, fake_runner, outputs, 2, 3)
    h.run()
    assert h.records["a"].finish_reason is FinishReason.STOP
    assert h.records["a"].token_ids == outputs[5 : outputs.index(stop)]
    again = make_harness()
    reserve(again, outputs, 2, stop_token_ids=(stop,), min_tokens=outputs.index(stop) + 1)
    arrive(again, fake_runner, outputs, 2, 3)
    again.run()
    assert len(again.records["a"].token_ids) > len(h.records["a"].token_ids)


def test_cached_prefix_is_not_read_again_and_the_last_block_is_its_own(
    make_harness: Make, fake_runner: ModuleType, outputs: list[int], assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("before", PROMPT, max_tokens=10)
    h.run()
    # 11 + 5 known tokens are four full blocks, the last of which the owner has not completed.
    assert reserve(h, outputs, 5).num_cached_blocks == 3
    arrive(h, fake_runner, outputs, 5, 0)
    h.run()
    assert h.records["a"].token_ids == outputs[5:100]
    assert_engine_empty(h.engine)


def test_preempted_after_its_takeover_it_is_computed_here(
    make_harness: Make, fake_runner: ModuleType, outputs: list[int], expected_output: Make
) -> None:
    h = make_harness(num_blocks=12, enable_prefix_caching=False)
    h.submit("b", PROMPT[2:], max_tokens=30)
    h.step()
    reserve(h, outputs, 3, max_tokens=20)
    arrive(h, fake_runner, outputs, 3, 2)
    h.run()
    assert h.engine.load().num_preemptions > 0
    assert h.records["a"].token_ids == outputs[5:20]
    assert h.records["b"].token_ids == expected_output(PROMPT[2:], 30)


def test_cancelled_while_its_kv_arrives(
    make_harness: Make, fake_runner: ModuleType, outputs: list[int], assert_engine_empty: Make
) -> None:
    h = make_harness()
    reserve(h, outputs, 4)
    h.engine.cancel("a")
    h.run()
    assert h.records["a"].finish_reason is FinishReason.CANCELLED
    arrive(h, fake_runner, outputs, 4, 2)
    h.run()
    assert len(h.engine.cached_hashes()) == (11 + 4 + 2 - 1) // 4
    assert_engine_empty(h.engine)


@pytest.mark.parametrize(
    ("first_index", "token_ids", "reason"),
    [
        (2, [1, 2], "output 2 arrived where 3 is next"),
        (4, [1], "output 4 arrived where 3 is next"),
        (3, [97], "a token that arrived 97 is outside the vocabulary"),
        (3, [-1], "a token that arrived -1 is outside the vocabulary"),
        (3, [1] * 8, "10 are its limit|21 are its limit"),
        (3, [1] * 80, "80 more tokens arrived"),
    ],
)
def test_what_cannot_belong_to_it_changes_nothing(
    make_harness: Make,
    fake_runner: ModuleType,
    outputs: list[int],
    assert_engine_empty: Make,
    first_index: int,
    token_ids: list[int],
    reason: str,
) -> None:
    h = make_harness(vocab_size=97)
    reserve(h, outputs, 3, max_tokens=10)
    with pytest.raises(InvalidRequest, match=reason):
        h.engine.activate("a", TokenDelta(RequestId("a"), first_index, token_ids))
    h.check()
    arrive(h, fake_runner, outputs, 3, 2)
    h.run()
    assert h.records["a"].token_ids == outputs[5:10]
    assert_engine_empty(h.engine)


def test_decode_takes_exactly_one_first_token(make_harness: Make) -> None:
    h = make_harness(vocab_size=97)
    h.submit("d", PROMPT, work=Work.DECODE, max_tokens=4)
    h.step()
    for token_ids in ([], [1, 2], [97]):
        with pytest.raises(InvalidRequest):
            h.engine.activate("d", TokenDelta(RequestId("d"), 0, token_ids))
        h.check()
    h.engine.abandon("d", unsettled=())
