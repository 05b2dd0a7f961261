"""Two steps in flight: what is launched ahead, what waits, and what must not change hands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from baton.core.errors import InternalError
from baton.core.request import FinishReason, TokenDelta, Work
from baton.engine.batch import Batch, CompletedStep, ScheduledSequence, SequenceSlice, slices
from baton.engine.engine import BatchOutcome
from baton.engine.in_flight import StepsInFlight
from baton.engine.sequence import Sequence

Make = Callable[..., Any]
PROMPT = [(3 + 11 * i) % 97 for i in range(22)]


@pytest.fixture(scope="session")
def make_harness(make_harness_of_depth: Make) -> Make:
    return functools.partial(make_harness_of_depth, 2)


def test_steady_decode_launches_before_it_waits(make_harness: Make) -> None:
    h = make_harness()
    h.submit("a", PROMPT[:4], max_tokens=6)
    h.run()
    assert h.runner.events == [
        ("launch", 0),
        *(pair for i in range(1, 6) for pair in (("launch", i), ("wait", i - 1))),
        ("wait", 5),
    ]


def test_end_by_length_is_foreseen_and_wastes_nothing(
    make_harness: Make, expected_output: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT[:4], max_tokens=3)
    h.run()
    assert h.runner.batches == [[("a", 4)], [("a", 1)], [("a", 1)]]
    assert h.records["a"].token_ids == expected_output(PROMPT[:4], 3)


def test_last_delta_does_not_wait_for_the_wasted_row_and_the_blocks_do(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(block_size=4)
    # The stop token would open a block of its own: 4 + 3 known tokens and one that stops.
    stop = expected_output(PROMPT[:5], 4)[3]
    h.submit("a", PROMPT[:5], max_tokens=9, stop_token_ids=(stop,))
    while h.records["a"].last is None:
        h.step()
    assert h.runner.batches[-1] == [("a", 1)] and h.runner.is_in_flight(4)
    load = h.engine.load()
    assert (load.num_running, load.free_blocks + load.cached_blocks) == (0, 32 - 3)
    assert load.resident_kv_tokens == 9
    assert h.engine.has_work and not h.engine.is_empty
    h.engine.cancel("a")
    output = h.step()
    assert not output.deltas and output.batch is BatchOutcome.COMPUTED
    assert h.records["a"].token_ids == expected_output(PROMPT[:5], 3)
    assert len(h.runner.batches) == 5
    assert_engine_empty(h.engine)


def test_only_real_tokens_of_a_stopped_sequence_are_cached(
    make_harness: Make, expected_output: Make
) -> None:
    h = make_harness(block_size=2)
    # Seven tokens are real, so the wasted row completes the fourth block with the stop token.
    stop = expected_output(PROMPT[:4], 4)[3]
    h.submit("a", PROMPT[:4], max_tokens=9, stop_token_ids=(stop,), min_tokens=3)
    h.run()
    assert len(h.records["a"].token_ids) == 3
    assert len(h.hashes) == 3


def test_new_request_joins_the_step_after_the_one_in_flight(make_harness: Make) -> None:
    h = make_harness()
    h.submit("a", PROMPT[:4], max_tokens=6)
    h.step()
    h.submit("b", PROMPT[4:8], max_tokens=6)
    h.step()
    assert h.runner.batches[1] == [("a", 1), ("b", 4)]


def test_place_of_an_ending_sequence_is_taken_at_once(make_harness: Make) -> None:
    h = make_harness(max_num_seqs=1)
    h.submit("a", PROMPT[:4], max_tokens=1)
    h.submit("p", PROMPT[4:8], work=Work.PREFILL)
    h.submit("b", PROMPT[8:12], max_tokens=1)
    h.run()
    assert h.runner.batches == [[("a", 4)], [("p", 4)], [("b", 4)]]
    assert h.runner.events[1:3] == [("launch", 1), ("wait", 0)]
    h.engine.release_lease("p")


def test_prefill_announces_blocks_once_their_step_is_over(
    make_harness: Make, fake_runner: ModuleType, assert_engine_empty: Make
) -> None:
    h = make_harness(max_num_batched_tokens=8)
    h.submit("p", PROMPT, work=Work.PREFILL)
    expected = fake_runner.fingerprints(PROMPT)
    assert not h.step().chunks, "nothing is over yet"
    num_blocks = []
    while h.records["p"].last is None:
        for chunk in h.step().chunks:
            # Memory shows garbage where a step in flight has yet to write.
            values = [v for block in h.runner.read_blocks(chunk.block_ids) for v in block]
            first = chunk.first_block_index * 4
            known = expected[first : first + len(values)]
            assert values[: len(known)] == known
            num_blocks.append(len(chunk.block_ids))
    assert num_blocks == [2, 2, 2]
    h.engine.release_lease("p")
    assert_engine_empty(h.engine)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
@pytest.mark.parametrize("work", [Work.GENERATE, Work.PREFILL])
def test_cancel_with_a_step_in_flight_ends_the_client_first(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, num_steps: int, work: Work
) -> None:
    h = make_harness(max_num_batched_tokens=8)
    h.submit("a", PROMPT, max_tokens=9, work=work)
    for _ in range(num_steps):
        h.step()
    if h.records["a"].last is None:
        num_held = h.engine.load()
        h.engine.cancel("a")
        h.check()
        assert h.engine.load().num_running == 0
        assert h.engine.load().free_blocks == num_held.free_blocks, "a step writes to them"
        h.step()
        assert h.records["a"].finish_reason is FinishReason.CANCELLED
        assert h.records["a"].last.first_index == len(h.records["a"].token_ids)
    h.run()
    token_ids = h.records["a"].token_ids
    assert token_ids == expected_output(PROMPT, len(token_ids))
    h.engine.release_lease("a")
    assert_engine_empty(h.engine)


def test_id_of_a_retiring_sequence_is_free_for_another_request(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT[:6], max_tokens=9, is_cached=False)
    for _ in range(3):
        h.step()
    del h.records["a"]
    h.engine.cancel("a")
    h.submit("a", PROMPT[6:12], max_tokens=4, is_cached=False)
    (delta,) = h.engine.step().deltas
    assert delta.finish_reason is FinishReason.CANCELLED
    h.run()
    assert h.records["a"].token_ids == expected_output(PROMPT[6:12], 4)
    assert_engine_empty(h.engine)


def test_reader_gets_no_block_that_a_step_in_flight_writes(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(3, block_size=4, max_model_len=12)
    stop = expected_output(PROMPT[:4], 3)[2]
    h.submit("a", PROMPT[:4], max_tokens=8, stop_token_ids=(stop,), is_cached=False)
    h.submit("d", PROMPT[4:15], work=Work.DECODE)
    while h.records["a"].last is None:
        h.step()
    assert h.engine.load().free_blocks < 3
    assert h.records["d"].reservation is None
    h.run()
    blocks = h.records["d"].reservation.block_ids
    assert len(blocks) == 3
    h.runner.write_blocks(blocks, [[0] * 4] * 3)
    h.check()
    h.engine.abandon("d", unsettled=())
    assert_engine_empty(h.engine)


def test_preemption_waits_for_what_is_in_flight(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(6, max_num_batched_tokens=32, max_model_len=24)
    h.submit("old", PROMPT[:8], max_tokens=12)
    h.submit("new", PROMPT[8:16], max_tokens=12)
    num_preemptions = 0
    while h.engine.has_work:
        num_events = len(h.runner.events)
        h.step()
        if h.engine.load().num_preemptions > num_preemptions:
            num_preemptions += 1
            assert [name for name, _ in h.runner.events[num_events:]] == ["wait", "launch"]
    assert num_preemptions
    for name, prompt in (("old", PROMPT[:8]), ("new", PROMPT[8:16])):
        assert h.records[name].token_ids == expected_output(prompt, 12)
    assert_engine_empty(h.engine)


def test_failure_of_a_step_takes_all_in_flight_with_it(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(max_num_seqs=2)
    h.submit("a", PROMPT[:4], max_tokens=9)
    h.step()
    h.runner.fail_wait_with = RuntimeError("device error")
    h.step()
    h.submit("b", PROMPT[4:8], max_tokens=9)
    h.submit("waits", PROMPT[8:12], max_tokens=3)
    output = h.step()
    assert h.runner.batches[2] == [("a", 1), ("b", 4)]
    assert output.batch is BatchOutcome.FAILED
    assert h.runner.events[-1] == ("wait", 2), "nothing is in flight when blocks are released"
    assert {name for name, r in h.records.items() if r.last} == {"a", "b"}
    assert h.records["a"].token_ids == expected_output(PROMPT[:4], 1)
    h.run()
    assert h.records["waits"].token_ids == expected_output(PROMPT[8:12], 3)
    assert_engine_empty(h.engine)


def test_failed_launch_waits_for_the_step_before(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT[:4], max_tokens=9)
    h.submit("p", PROMPT[4:8], work=Work.PREFILL)
    h.step()
    h.runner.fail_with = RuntimeError("out of memory")
    h.submit("b", PROMPT[8:12], max_tokens=9)
    assert h.step().batch is BatchOutcome.FAILED
    assert h.runner.events[-1] == ("wait", 0)
    assert all(r.finish_reason is FinishReason.ERROR for r in h.records.values())
    assert_engine_empty(h.engine)


def test_failure_of_a_wasted_row_says_nothing_to_its_client(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    stop = expected_output(PROMPT[:4], 2)[1]
    h.submit("a", PROMPT[:4], max_tokens=9, stop_token_ids=(stop,))
    h.step()
    h.step()
    h.runner.fail_wait_with = RuntimeError("device error")
    h.step()
    assert h.records["a"].finish_reason is FinishReason.STOP
    assert h.step().batch is BatchOutcome.FAILED
    assert len(h.records["a"].deltas) == 2
    assert_engine_empty(h.engine)


def test_activated_sequence_joins_while_a_step_is_in_flight(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    p, d = make_harness(max_num_batched_tokens=64), make_harness()
    d.submit("g", PROMPT[:4], max_tokens=20)
    d.step()
    p.submit("d", PROMPT, work=Work.PREFILL, max_tokens=6)
    d.submit("d", PROMPT, work=Work.DECODE, max_tokens=6)
    p.run()
    d.step()
    d.read_from(p, "d")
    first: TokenDelta = p.records["d"].chunks[-1].first_token
    d.engine.activate("d", first)
    d.step()
    assert ("d", 1) in d.runner.batches[-1]
    d.run()
    assert first.token_ids + d.records["d"].token_ids == expected_output(PROMPT, 6)
    p.engine.release_lease("d")
    assert_engine_empty(d.engine)


def test_slice_marks_the_pending_token(harness: ModuleType) -> None:
    sequence = Sequence(harness.make_request("r", [1, 2, 3, 4, 5], max_tokens=9))
    sequence.block_table = [7, 8, 9]
    chunk = ScheduledSequence(sequence, 3)
    assert SequenceSlice.of(chunk, 4) == ("r", 0, (1, 2, 3), False, (7,), False, 0)
    sequence.num_computed_tokens = 3
    rest = ScheduledSequence(sequence, 2)
    assert SequenceSlice.of(rest, 4) == ("r", 3, (4, 5), False, (7, 8), True, 0)
    sequence.num_computed_tokens, sequence.num_in_flight_tokens = 5, 2
    sequence.num_pending_tokens = 1
    assert (sequence.num_tokens, sequence.num_output_tokens) == (6, 1)
    assert (sequence.num_known_output_tokens, sequence.num_settled_tokens) == (0, 3)
    ahead = ScheduledSequence(sequence, 1)
    assert slices(Batch((ahead, ahead)), 4) == (("r", 5, (0,), True, (7, 8), True, 0),) * 2


@pytest.mark.parametrize(("work", "max_tokens"), [(Work.PREFILL, 9), (Work.GENERATE, 1)])
def test_sequence_is_ending_while_its_last_token_is_pending(
    harness: ModuleType, work: Work, max_tokens: int
) -> None:
    sequence = Sequence(harness.make_request("r", [1, 2], work=work, max_tokens=max_tokens))
    assert not sequence.is_ending
    sequence.num_pending_tokens = 1
    assert sequence.is_ending
    goes_on = Sequence(harness.make_request("s", [1, 2], max_tokens=2))
    goes_on.num_pending_tokens = 1
    assert not goes_on.is_ending


class OneStepRunner:
    max_in_flight = 3

    def launch(self, batch: Batch) -> CompletedStep:
        return CompletedStep([None] * len(batch.scheduled))


def test_depth_is_bounded_and_counts_are_checked(harness: ModuleType) -> None:
    runner = OneStepRunner()
    with pytest.raises(InternalError, match="wants 3 steps in flight, the engine keeps 1 to 2"):
        StepsInFlight(runner)
    runner.max_in_flight = 2
    steps = StepsInFlight(runner)
    sequence = Sequence(harness.make_request("r", [1, 2, 3]))
    steps.launch(Batch((ScheduledSequence(sequence, 2),)))
    steps.check_integrity([sequence])
    with pytest.raises(InternalError, match=r"for sequences that are gone: \['r'\]"):
        steps.check_integrity([])
    sequence.num_pending_tokens = 1
    with pytest.raises(InternalError, match=r"counts \(2, 1\) .* hold \(2, 0\)"):
        steps.check_integrity([sequence])
