"""Handing a running sequence on: announced while it runs, frozen, finished or resumed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from baton.core.errors import InternalError, InvalidRequest, NotFound
from baton.core.request import FinishReason, Work

Make = Callable[..., Any]
PROMPT = [(5 + 13 * i) % 97 for i in range(11)]
MAX_TOKENS = 12


def take_over(owner: Any, reader: Any, name: str, **fields: Any) -> None:
    """Submit `name` to the reader with the tokens that the owner has told so far."""
    known = owner.records[name].token_ids
    fields = {"max_tokens": MAX_TOKENS, **fields}
    reader.submit(name, PROMPT, work=Work.TAKEOVER, output_token_ids=tuple(known), **fields)
    reader.step()
    assert reader.records[name].reservation is not None
    owner.engine.start_handover(name, num_known_tokens=len(known))


def freeze(owner: Any, name: str) -> Any:
    """Returns the last announcement."""
    owner.engine.freeze(name)
    for _ in range(10):
        chunks = owner.records[name].chunks
        if chunks and chunks[-1].is_last:
            return chunks[-1]
        owner.step()
    raise AssertionError("it does not stand still")


def hand_on(owner: Any, reader: Any, name: str) -> None:
    last = freeze(owner, name)
    reader.read_from(owner, name)
    owner.engine.finish_handover(name)
    reader.engine.activate(name, last.first_token)


@pytest.mark.parametrize("num_steps_before", range(1, 12))
@pytest.mark.parametrize("num_steps_between", [0, 1, 3])
def test_handed_on_at_any_point_gives_the_unbroken_tokens(
    make_harness: Make,
    expected_output: Make,
    assert_engine_empty: Make,
    num_steps_before: int,
    num_steps_between: int,
) -> None:
    owner, reader = make_harness(), make_harness()
    owner.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    for _ in range(num_steps_before):
        owner.step()
    take_over(owner, reader, "a")
    for _ in range(num_steps_between):
        owner.step()
    if owner.records["a"].last is None:
        owner.engine.freeze("a")
        owner.step()
    if owner.records["a"].last is not None:
        # Its end was under way already.
        assert owner.records["a"].finish_reason is FinishReason.LENGTH
        reader.engine.abandon("a", unsettled=())
        owner.engine.release_lease("a")
    else:
        hand_on(owner, reader, "a")
        owner.run()
        reader.run()
        assert owner.records["a"].last.finish_reason is None
        assert owner.records["a"].last.token_ids == []
        assert reader.records["a"].finish_reason is FinishReason.LENGTH
        # Told by exactly one of the two.
        assert reader.records["a"].deltas[0].first_index == len(owner.records["a"].token_ids)
    tokens = owner.records["a"].token_ids + reader.records["a"].token_ids
    assert tokens == expected_output(PROMPT, MAX_TOKENS)
    assert_engine_empty(owner.engine)
    assert_engine_empty(reader.engine)


@pytest.mark.parametrize("num_steps", range(1, 10))
@pytest.mark.parametrize("is_frozen", [False, True])
def test_resumed_sequence_goes_on_as_if_nothing_had_been(
    make_harness: Make,
    expected_output: Make,
    assert_engine_empty: Make,
    num_steps: int,
    is_frozen: bool,
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    for _ in range(num_steps):
        h.step()
    for _ in range(2):
        h.records["a"].chunks = []
        h.engine.start_handover("a", num_known_tokens=0)
        if is_frozen:
            last = freeze(h, "a")
            assert last.first_token.token_ids == h.records["a"].token_ids
            assert not h.engine.has_work
        h.engine.release_lease("a")
        h.engine.resume("a")
        h.engine.resume("a")
        h.check()
    h.run()
    assert h.records["a"].token_ids == expected_output(PROMPT, MAX_TOKENS)
    assert_engine_empty(h.engine)


def test_finished_blocks_are_announced_once_each_and_stay_as_they_are(
    make_harness: Make, fake_runner: ModuleType
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    while len(h.records["a"].token_ids) < 2:
        h.step()
    h.engine.start_handover("a", num_known_tokens=1)
    assert h.engine.has_work
    for _ in range(6):
        h.step()
    chunks = h.records["a"].chunks
    assert [len(c.block_ids) for c in chunks] == [3, 1]
    assert not any(c.is_last or c.first_token for c in chunks)
    last = freeze(h, "a")
    tokens = h.records["a"].token_ids
    assert last.is_last
    assert (last.first_token.first_index, last.first_token.token_ids) == (1, tokens[1:])
    expected = fake_runner.fingerprints([*PROMPT, *tokens[:-1]])
    blocks = h.runner.read_blocks(h.records["a"].announced)
    assert [v for values in blocks for v in values][: len(expected)] == expected
    assert len(blocks) == -(-len(expected) // 4)


def test_frozen_sequence_is_in_no_batch_and_others_go_on(
    make_harness: Make, expected_output: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    h.submit("b", PROMPT[:5], max_tokens=MAX_TOKENS)
    while len(h.records["a"].token_ids) < 3:
        h.step()
    h.engine.start_handover("a", num_known_tokens=3)
    freeze(h, "a")
    num_batches = len(h.runner.batches)
    h.run()
    assert all(name == "b" for batch in h.runner.batches[num_batches:] for name, _ in batch)
    assert h.records["b"].token_ids == expected_output(PROMPT[:5], MAX_TOKENS)
    assert h.engine.load().num_running == 1
    assert not h.engine.is_empty


def test_sequence_still_computing_its_prompt_is_frozen_once_it_has_a_token(
    make_harness: Make, expected_output: Make
) -> None:
    owner, reader = make_harness(max_num_batched_tokens=4), make_harness()
    owner.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    owner.step()
    take_over(owner, reader, "a")
    hand_on(owner, reader, "a")
    reader.run()
    tokens = owner.records["a"].token_ids + reader.records["a"].token_ids
    assert tokens == expected_output(PROMPT, MAX_TOKENS)


def test_handed_on_twice(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    first, second, third = (make_harness() for _ in range(3))
    first.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    while len(first.records["a"].token_ids) < 4:
        first.step()
    take_over(first, second, "a")
    hand_on(first, second, "a")
    while len(second.records["a"].token_ids) < 3:
        second.step()
    known = first.records["a"].token_ids + second.records["a"].token_ids
    third.submit(
        "a", PROMPT, work=Work.TAKEOVER, max_tokens=MAX_TOKENS, output_token_ids=tuple(known)
    )
    third.step()
    second.engine.start_handover("a", num_known_tokens=len(known))
    hand_on(second, third, "a")
    harnesses = (first, second, third)
    for h in harnesses:
        h.run()
        assert_engine_empty(h.engine)
    tokens = [t for h in harnesses for t in h.records["a"].token_ids]
    assert tokens == expected_output(PROMPT, MAX_TOKENS)


def test_sequence_that_ends_by_itself_ends_its_handover(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=4)
    h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    ended = []
    while h.engine.has_work:
        ended += h.step().handovers_ended
    assert ended == ["a"]
    assert h.records["a"].finish_reason is FinishReason.LENGTH
    assert h.engine.load().leases == 1
    with pytest.raises(NotFound):
        h.engine.freeze("a")
    h.engine.release_lease("a")
    assert_engine_empty(h.engine)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_cancelled_while_handed_on(
    make_harness: Make, assert_engine_empty: Make, is_frozen: bool
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    while len(h.records["a"].token_ids) < 2:
        h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    if is_frozen:
        freeze(h, "a")
    h.engine.cancel("a")
    assert h.step().handovers_ended == ["a"]
    assert h.records["a"].finish_reason is FinishReason.CANCELLED
    with pytest.raises(NotFound, match="not frozen"):
        h.engine.finish_handover("a")
    h.engine.resume("a")
    h.run()
    h.engine.release_lease("a")
    assert_engine_empty(h.engine)


def test_failed_step_ends_the_handover_and_spares_a_frozen_sequence(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    for name in "ab":
        h.submit(name, PROMPT, max_tokens=MAX_TOKENS)
    while len(h.records["b"].token_ids) < 2:
        h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    h.engine.start_handover("b", num_known_tokens=0)
    freeze(h, "a")
    h.runner.fail_with = RuntimeError("device")
    assert h.step().handovers_ended == ["b"]
    assert h.records["b"].finish_reason is FinishReason.ERROR
    assert h.records["a"].last is None
    for name in "ab":
        h.engine.release_lease(name)
        h.engine.resume(name)
    h.run()
    assert h.records["a"].token_ids == expected_output(PROMPT, MAX_TOKENS)
    assert_engine_empty(h.engine)


def test_preemption_ends_the_handover_and_leaves_the_lease(
    make_harness: Make, expected_output: Make, fake_runner: ModuleType, assert_engine_empty: Make
) -> None:
    h = make_harness(num_blocks=10, enable_prefix_caching=False)
    h.submit("a", PROMPT, max_tokens=20)
    h.submit("b", PROMPT[1:], max_tokens=20)
    while len(h.records["b"].token_ids) < 3:
        h.step()
    h.engine.start_handover("b", num_known_tokens=0)
    ended: list[Any] = []
    while not ended:
        ended += h.step().handovers_ended
    assert (ended, h.engine.load().num_preemptions) == (["b"], 1)
    announced = h.records["b"].announced
    expected = fake_runner.fingerprints([*PROMPT[1:], *h.records["b"].token_ids])
    for _ in range(3):
        stored = [v for values in h.runner.read_blocks(announced) for v in values]
        assert stored == expected[: len(stored)]
        h.step()
    with pytest.raises((NotFound, InvalidRequest)):
        h.engine.start_handover("b", num_known_tokens=0)
    h.engine.release_lease("b")
    h.engine.resume("b")
    h.run()
    assert h.records["a"].token_ids == expected_output(PROMPT, 20)
    assert h.records["b"].token_ids == expected_output(PROMPT[1:], 20)
    assert_engine_empty(h.engine)


def test_frozen_sequence_is_never_preempted(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(num_blocks=9)
    h.submit("a", PROMPT, max_tokens=20)
    h.submit("b", PROMPT[1:], max_tokens=20)
    while len(h.records["b"].token_ids) < 3:
        h.step()
    h.engine.start_handover("b", num_known_tokens=0)
    freeze(h, "b")
    h.run()
    # It found no block and waits for those of the frozen one.
    assert h.records["a"].last is None
    assert (h.engine.load().num_preemptions, h.engine.load().num_waiting) == (1, 1)
    h.engine.finish_handover("b")
    h.run()
    assert h.records["b"].last.finish_reason is None
    assert h.records["a"].token_ids == expected_output(PROMPT, 20)
    assert_engine_empty(h.engine)


def test_block_that_a_frozen_sequence_will_want_is_left_to_it(make_harness: Make) -> None:
    h = make_harness(num_blocks=8)
    h.submit("a", PROMPT[:4], max_tokens=16)
    while len(h.records["a"].token_ids) < 5:
        h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    freeze(h, "a")
    # It holds two full blocks, and the other takes the five that one more leaves.
    h.submit("b", [9] * 24, max_tokens=1)
    h.run()
    assert h.engine.load().num_waiting == 1
    h.engine.release_lease("a")
    h.engine.resume("a")
    h.run()
    assert h.engine.load().num_preemptions == 0
    assert h.records["b"].finish_reason is FinishReason.LENGTH


def test_frozen_sequence_does_not_resume_under_its_lease(make_harness: Make) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    freeze(h, "a")
    with pytest.raises(InternalError, match="release it first"):
        h.engine.resume("a")
    h.check()
    h.engine.release_lease("a")
    h.engine.resume("a")
    h.run()
    assert h.records["a"].finish_reason is FinishReason.LENGTH


def test_announcements_of_a_resumed_sequence_are_not_told(make_harness: Make) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    while len(h.records["a"].token_ids) < 2:
        h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    h.engine.release_lease("a")
    h.engine.resume("a")
    assert not h.step().chunks


@pytest.mark.parametrize("is_freezing", [False, True])
def test_handover_is_over_with_its_lease(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, is_freezing: bool
) -> None:
    """A step may come between the end of the lease and `resume`: it leases nothing again."""
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    while len(h.records["a"].token_ids) < 2:
        h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    h.step()
    if is_freezing and h.runner.max_in_flight == 2:
        h.engine.freeze("a")
    h.engine.release_lease("a")
    for _ in range(3):
        h.step()
    assert h.engine.load().leases == 0
    h.engine.resume("a")
    h.run()
    assert h.records["a"].token_ids == expected_output(PROMPT, MAX_TOKENS)
    assert_engine_empty(h.engine)


def test_frozen_sequence_stands_still_when_its_lease_has_ended(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=MAX_TOKENS)
    while len(h.records["a"].token_ids) < 2:
        h.step()
    h.engine.start_handover("a", num_known_tokens=0)
    freeze(h, "a")
    h.engine.release_lease("a")
    h.run()
    assert h.records["a"].last is None
    h.engine.finish_handover("a")
    h.run()
    assert h.records["a"].last.finish_reason is None
    assert_engine_empty(h.engine)


def test_who_cannot_be_handed_on(make_harness: Make) -> None:
    h = make_harness(max_num_seqs=1)
    h.submit("p", PROMPT, work=Work.PREFILL)
    h.submit("w", PROMPT, max_tokens=4)
    with pytest.raises(NotFound, match="not on this worker"):
        h.engine.start_handover("x", num_known_tokens=0)
    with pytest.raises(NotFound, match="prefill"):
        h.engine.start_handover("p", num_known_tokens=0)
    with pytest.raises(NotFound, match="waiting"):
        h.engine.start_handover("w", num_known_tokens=0)
    h.run()
    h.submit("g", PROMPT, max_tokens=8)
    h.step()
    with pytest.raises(NotFound, match="not being handed on"):
        h.engine.freeze("g")
    for num_known_tokens in (-1, 8):
        with pytest.raises(InvalidRequest, match="cannot know"):
            h.engine.start_handover("g", num_known_tokens=num_known_tokens)
    h.engine.start_handover("g", num_known_tokens=0)
    with pytest.raises(InvalidRequest, match="leased to a reader already"):
        h.engine.start_handover("g", num_known_tokens=0)
    with pytest.raises(NotFound, match="not frozen"):
        h.engine.finish_handover("g")
