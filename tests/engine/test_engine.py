"""The life of each kind of work, from submit to an empty engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import InvalidRequest, NotFound
from baton.core.lifecycle import LifecycleEvent, Timeline, TransferStats
from baton.core.request import FinishReason, TokenDelta, TokenLogprobs, Work
from baton.engine.batch import CompletedStep, SampledToken
from baton.engine.engine import BatchOutcome

Make = Callable[..., Any]
PROMPT = [(3 + 11 * i) % 97 for i in range(22)]


def test_generate_streams_tokens_and_leaves_nothing(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=9)
    h.run()
    record = h.records["a"]
    assert record.token_ids == expected_output(PROMPT, 9)
    assert [d.first_index for d in record.deltas] == list(range(9))
    assert record.finish_reason is FinishReason.LENGTH
    assert_engine_empty(h.engine)


@pytest.mark.parametrize("budget", [4, 5, 16, 64])
@pytest.mark.parametrize("is_cached", [True, False])
def test_chunking_and_batching_do_not_change_the_output(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, budget: int, is_cached
) -> None:
    h = make_harness(64, max_num_batched_tokens=budget, enable_prefix_caching=is_cached)
    prompts = {f"r{i}": PROMPT[: 3 + 5 * i] for i in range(4)}
    for name, prompt in prompts.items():
        h.submit(name, prompt, max_tokens=6)
    h.run()
    for name, prompt in prompts.items():
        assert h.records[name].token_ids == expected_output(prompt, 6)
    assert bool(h.hashes) == is_cached
    assert_engine_empty(h.engine)


def test_prefix_hit_skips_computed_blocks(make_harness: Make, expected_output: Make) -> None:
    h = make_harness(max_num_batched_tokens=64)
    h.submit("a", PROMPT, max_tokens=1)
    h.run()
    h.submit("b", [*PROMPT[:18], 1, 2], max_tokens=3)
    h.run()
    assert h.runner.batches[1] == [("b", 4)]
    assert h.records["b"].deltas[0].num_cached_tokens == 16
    assert h.records["b"].last.num_cached_tokens == 16
    assert h.records["b"].token_ids == expected_output([*PROMPT[:18], 1, 2], 3)
    assert h.engine.prefix_cache_stats == (42, 16)


def test_full_hit_still_computes_the_last_token_in_a_block_of_its_own(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=64)
    h.submit("a", PROMPT[:16], max_tokens=8)
    h.complete()
    h.submit("b", PROMPT[:16], max_tokens=2)
    h.run()
    assert h.records["b"].last.num_cached_tokens == 12
    assert any(("b", 4) in batch for batch in h.runner.batches)
    assert h.records["b"].token_ids == h.records["a"].token_ids[:2]


def test_generated_tokens_are_cached_once_their_kv_is_computed(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=64)
    h.submit("a", PROMPT[:10], max_tokens=8)
    h.run()
    turn = [*PROMPT[:10], *h.records["a"].token_ids, 5, 6]
    # 18 tokens are known after the first turn; the KV of the last one was never computed.
    assert len(h.hashes) == 4
    h.submit("b", turn, max_tokens=2)
    h.run()
    assert h.records["b"].last.num_cached_tokens == 16


def test_decoded_block_is_not_announced_before_its_last_token_is_computed(
    make_harness: Make,
) -> None:
    h = make_harness(max_num_batched_tokens=64)
    h.submit("a", PROMPT[:7], max_tokens=4)
    assert sum(len(output.stored) for output in h.complete()) == 1
    assert h.step().stored, "token 7 is computed now and completes the second block"
    h.engine.cancel("a")
    h.run()


def test_without_hashes_nothing_is_cached(make_harness: Make, assert_engine_empty: Make) -> None:
    h = make_harness()
    h.submit("a", PROMPT, max_tokens=9, is_cached=False)
    h.run()
    assert not h.hashes
    assert h.engine.load().cached_blocks == 0
    assert_engine_empty(h.engine)


def test_stop_token_ends_the_sequence_and_is_not_output(
    make_harness: Make, expected_output: Make
) -> None:
    full = expected_output(PROMPT, 8)
    stop = full[5]
    position = full.index(stop)
    for field in ("eos_token_ids", "stop_token_ids"):
        h = make_harness()
        h.submit("a", PROMPT, max_tokens=8, **{field: (stop,)})
        h.run()
        record = h.records["a"]
        assert record.token_ids == full[:position]
        assert record.last.stop_token_id == stop
        assert record.last.first_index == position
        assert record.finish_reason is FinishReason.STOP


def test_ignore_eos_and_min_tokens_keep_going(make_harness: Make, expected_output: Make) -> None:
    full = expected_output(PROMPT, 8)
    h = make_harness()
    h.submit("ignores", PROMPT, max_tokens=8, eos_token_ids=(full[2],), ignore_eos=True)
    h.submit("minimum", PROMPT, max_tokens=8, eos_token_ids=tuple(full), min_tokens=5)
    h.run()
    assert h.records["ignores"].token_ids == full
    assert h.records["minimum"].token_ids == full[:5]
    assert h.records["minimum"].finish_reason is FinishReason.STOP


def test_context_length_ends_with_length(make_harness: Make) -> None:
    h = make_harness(max_model_len=26)
    h.submit("a", PROMPT, max_tokens=100)
    h.run()
    assert len(h.records["a"].token_ids) == 4
    assert h.records["a"].finish_reason is FinishReason.LENGTH


def test_replay_continues_where_the_client_stopped(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    full = expected_output(PROMPT, 12)
    h = make_harness(max_num_batched_tokens=64)
    h.submit("a", PROMPT, max_tokens=12)
    h.run()
    h.submit("again", PROMPT, max_tokens=12, output_token_ids=tuple(full[:7]))
    h.run()
    record = h.records["again"]
    assert record.token_ids == full[7:]
    assert record.deltas[0].first_index == 7
    # 28 of 29 known tokens are reusable: the chain was continued over the replayed output.
    assert h.runner.batches[12] == [("again", 1)]
    assert_engine_empty(h.engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [1] * 26}, "has 26 tokens and this worker holds 26 .* at most 25"),
        ({"prompt": [1] * 200}, "has 200 tokens"),
        ({"prompt": [1, 97]}, "token id 97 is outside the vocabulary of 0 to 96"),
        ({"prompt": [1, -3]}, "token id -3 is outside"),
        ({"prompt": [1] * 8, "block_size": 2}, "4 block hashes .* 2 full blocks of 4"),
        ({"prompt": [1], "output_token_ids": (1, 2), "max_tokens": 2}, "2 output tokens exist"),
    ],
)
def test_impossible_requests_are_refused_with_numbers(
    make_harness: Make, harness: Any, assert_engine_empty: Make, fields: dict[str, Any], message
) -> None:
    h = make_harness(max_model_len=26, vocab_size=97)
    # A token below zero cannot be hashed either.
    fields = {"is_cached": min(fields["prompt"]) >= 0, **fields}
    with pytest.raises(InvalidRequest, match=message):
        h.engine.submit(harness.make_request("a", **fields))
    assert_engine_empty(h.engine)


def test_prompt_that_never_fits_the_pool_is_refused(make_harness: Make) -> None:
    h = make_harness(4, max_model_len=4096)
    with pytest.raises(InvalidRequest, match="has 16 tokens and this worker holds 16"):
        h.submit("a", PROMPT[:16])
    h.submit("b", PROMPT[:15], max_tokens=1)
    h.run()
    assert h.records["b"].finish_reason is FinishReason.LENGTH


def test_request_id_in_use_is_refused_until_its_lease_is_gone(make_harness: Make) -> None:
    h = make_harness()
    h.submit("a", PROMPT, work=Work.PREFILL)
    with pytest.raises(InvalidRequest, match="already on this worker"):
        h.submit("a", PROMPT)
    h.run()
    with pytest.raises(InvalidRequest, match="already on this worker"):
        h.submit("a", PROMPT)
    h.engine.release_lease("a")
    h.submit("a", PROMPT)


def test_prefill_announces_each_chunk_once_and_keeps_its_blocks(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(max_num_batched_tokens=10)
    h.submit("a", PROMPT, work=Work.PREFILL, max_tokens=9)
    h.run()
    record = h.records["a"]
    assert [(c.first_block_index, len(c.block_ids), c.is_last) for c in record.chunks] == [
        (0, 2, False),
        (2, 3, False),
        (5, 1, True),
    ]
    assert record.chunks[-1].first_token is record.deltas[0]
    assert record.token_ids == expected_output(PROMPT, 1)
    assert record.finish_reason is None and record.last is not None
    load = h.engine.load()
    assert (load.leases, load.num_running) == (1, 0)
    assert load.free_blocks + load.cached_blocks == load.total_blocks - 6
    assert not h.engine.is_empty
    h.engine.release_lease("a")
    h.engine.release_lease("a")
    assert_engine_empty(h.engine)


def test_prefill_announces_cached_blocks_with_its_first_chunk(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=4)
    h.submit("a", PROMPT[:16], max_tokens=1)
    h.run()
    h.submit("p", PROMPT, work=Work.PREFILL)
    chunk = h.complete()[-1].chunks[0]
    assert (chunk.first_block_index, len(chunk.block_ids), chunk.is_last) == (0, 5, False)
    h.run()
    h.engine.release_lease("p")


def test_prefill_in_whole_blocks_ends_with_the_last_full_block(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=64)
    h.submit("a", PROMPT[:16], work=Work.PREFILL)
    h.run()
    assert [(len(c.block_ids), c.is_last) for c in h.records["a"].chunks] == [(4, True)]
    h.engine.release_lease("a")


def test_prefill_says_when_the_first_token_was_the_last(
    make_harness: Make, expected_output: Make
) -> None:
    first = expected_output(PROMPT, 1)[0]
    h = make_harness()
    h.submit("stop", PROMPT, work=Work.PREFILL, max_tokens=5, stop_token_ids=(first,))
    h.submit("length", PROMPT, work=Work.PREFILL, max_tokens=1)
    h.run()
    assert h.records["stop"].finish_reason is FinishReason.STOP
    assert h.records["length"].finish_reason is FinishReason.LENGTH
    assert h.records["stop"].chunks[-1].first_token.stop_token_id == first


def test_leased_blocks_keep_their_kv_while_others_fill_the_pool(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(10, max_model_len=40)
    h.submit("p", PROMPT, work=Work.PREFILL)
    h.run()
    blocks = h.records["p"].announced
    before = h.runner.read_blocks(blocks)
    for i in range(6):
        h.submit(f"g{i}", [(i + 2 * k) % 97 for k in range(9)], max_tokens=5)
    h.run()
    assert h.runner.read_blocks(blocks) == before
    h.engine.release_lease("p")
    assert_engine_empty(h.engine)


@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 5, 16, 22])
def test_disaggregated_output_equals_colocated(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, num_prompt_tokens: int
) -> None:
    prompt = PROMPT[:num_prompt_tokens]
    p, d = make_harness(), make_harness(enable_prefix_caching=True)
    d.submit("a", prompt, work=Work.DECODE, max_tokens=9)
    p.submit("a", prompt, work=Work.PREFILL, max_tokens=9)
    d.run()
    p.run()
    d.read_from(p, "a")
    first = p.records["a"].chunks[-1].first_token
    d.engine.activate("a", first)
    p.engine.release_lease("a")
    d.run()
    assert first.token_ids + d.records["a"].token_ids == expected_output(prompt, 9)
    assert d.records["a"].deltas[0].first_index == 1
    assert d.records["a"].finish_reason is FinishReason.LENGTH
    assert_engine_empty(p.engine)
    assert_engine_empty(d.engine)


def test_decode_reserves_only_what_it_does_not_hold(make_harness: Make) -> None:
    d, p = make_harness(), make_harness()
    d.submit("g", PROMPT[:16], max_tokens=1)
    d.run()
    d.submit("a", PROMPT[:16], work=Work.DECODE, max_tokens=4)
    d.run()
    reservation = d.records["a"].reservation
    assert (len(reservation.block_ids), reservation.num_cached_blocks) == (4, 4)
    p.submit("a", PROMPT[:16], work=Work.PREFILL, max_tokens=4)
    p.run()
    d.engine.activate("a", p.records["a"].chunks[-1].first_token)
    d.run()
    assert len(d.records["a"].token_ids) == 3
    assert d.records["a"].last.num_cached_tokens == 16


def test_arrived_blocks_are_cached_even_when_the_first_token_was_the_last(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    d, p = make_harness(), make_harness()
    d.submit("a", PROMPT, work=Work.DECODE, max_tokens=1)
    p.submit("a", PROMPT, work=Work.PREFILL, max_tokens=1)
    d.run()
    p.run()
    d.read_from(p, "a")
    d.engine.activate("a", p.records["a"].chunks[-1].first_token)
    d.run()
    assert not d.records["a"].deltas
    assert len(d.hashes) == 5
    assert_engine_empty(d.engine)


def test_abandoned_blocks_are_never_cached_and_unsettled_ones_wait(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, work=Work.DECODE)
    h.run()
    blocks = h.records["a"].reservation.block_ids
    h.engine.abandon("a", unsettled=blocks[2:4])
    h.run()
    load = h.engine.load()
    assert (load.quarantined_blocks, load.free_blocks, load.cached_blocks) == (2, 30, 0)
    assert h.engine.is_empty, "quarantine belongs to no request"
    h.engine.recover(blocks[2:4])
    assert_engine_empty(h.engine)


@pytest.mark.parametrize("operation", ["activate", "abandon"])
def test_unknown_reservation_is_named(make_harness: Make, operation: str) -> None:
    h = make_harness()
    with pytest.raises(NotFound, match="r9 holds no reservation"):
        if operation == "activate":
            h.engine.activate("r9", TokenDelta("r9"))
        else:
            h.engine.abandon("r9", unsettled=())


def cancel_when_waiting(h: Any) -> None:
    h.submit("other", PROMPT[1:], max_tokens=30)
    h.step()
    h.submit("a", PROMPT)


def cancel_when_prefilling(h: Any) -> None:
    h.submit("a", PROMPT)
    h.step()


def cancel_when_decoding(h: Any) -> None:
    h.submit("a", PROMPT, max_tokens=30)
    for _ in range(8):
        h.step()


def cancel_when_preempted(h: Any) -> None:
    h.submit("other", PROMPT[:4], max_tokens=30)
    h.submit("a", PROMPT[4:8], max_tokens=30)
    while not h.engine.load().num_preemptions:
        h.step()


@pytest.mark.parametrize(
    "reach", [cancel_when_waiting, cancel_when_prefilling, cancel_when_decoding]
)
@pytest.mark.parametrize("work", [Work.GENERATE, Work.PREFILL])
def test_cancel_ends_any_state_exactly_once(
    make_harness: Make, assert_engine_empty: Make, reach: Callable[[Any], None], work: Work
) -> None:
    h = make_harness(10, max_num_seqs=1, max_num_batched_tokens=4, max_model_len=40)
    submit = h.submit
    h.submit = lambda name, prompt, **f: submit(name, prompt, work=work, **f)
    reach(h)
    if h.records["a"].last is None:
        for _ in range(2):
            h.engine.cancel("a")
        assert h.engine.has_work
        h.step()
        assert h.records["a"].finish_reason is FinishReason.CANCELLED
    h.engine.cancel("a")
    h.engine.cancel("other")
    h.run()
    assert h.records["a"].last is not None
    for name in ("a", "other"):
        h.engine.release_lease(name)
    assert_engine_empty(h.engine)


def test_cancel_of_a_preempted_sequence(make_harness: Make, assert_engine_empty: Make) -> None:
    h = make_harness(6, max_model_len=24)
    cancel_when_preempted(h)
    h.engine.cancel("a")
    h.run()
    assert h.records["a"].finish_reason is FinishReason.CANCELLED
    assert h.records["other"].finish_reason is FinishReason.LENGTH
    assert_engine_empty(h.engine)


def test_cancelled_prefill_keeps_its_leases_until_they_are_released(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(max_num_batched_tokens=8)
    h.submit("a", PROMPT, work=Work.PREFILL)
    h.complete()
    h.engine.cancel("a")
    h.run()
    assert h.engine.load().leases == 1
    h.engine.release_lease("a")
    assert_engine_empty(h.engine)


@pytest.mark.parametrize("answer", ["activate", "abandon"])
def test_cancelled_reservation_keeps_its_blocks_until_it_is_answered(
    make_harness: Make, assert_engine_empty: Make, answer: str
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, work=Work.DECODE)
    h.run()
    h.engine.cancel("a")
    h.engine.cancel("a")
    h.run()
    assert h.records["a"].finish_reason is FinishReason.CANCELLED
    assert h.engine.load().reservations == 1
    if answer == "activate":
        h.engine.activate("a", TokenDelta("a", token_ids=[5]))
    else:
        h.engine.abandon("a", unsettled=())
    h.run()
    assert_engine_empty(h.engine)


def test_ungranted_reservation_can_be_cancelled(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    h.submit("a", PROMPT, work=Work.DECODE)
    h.engine.cancel("a")
    h.run()
    assert h.records["a"].reservation is None
    assert h.records["a"].finish_reason is FinishReason.CANCELLED
    assert_engine_empty(h.engine)


@pytest.mark.parametrize("when", ["fail_with", "fail_wait_with"])
def test_failed_step_ends_its_batch_and_the_engine_goes_on(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, when: str
) -> None:
    h = make_harness(max_num_seqs=2, max_num_batched_tokens=8)
    h.submit("g", PROMPT[:6], max_tokens=9)
    h.submit("p", PROMPT, work=Work.PREFILL)
    h.submit("waits", PROMPT[:6], max_tokens=9)
    for _ in range(2):
        h.step()
    setattr(h.runner, when, RuntimeError("/secret/path out of memory"))
    assert h.complete()[-1].batch is BatchOutcome.FAILED
    for name in ("g", "p"):
        last = h.records[name].last
        assert (last.finish_reason, last.is_retryable) == (FinishReason.ERROR, True)
        assert "RuntimeError" in last.error and "/secret" not in last.error
    assert not h.records["waits"].deltas
    assert h.complete()[-1].batch is BatchOutcome.COMPUTED
    h.run()
    assert h.step().batch is BatchOutcome.NONE
    assert h.records["waits"].token_ids == expected_output(PROMPT[:6], 9)
    h.engine.release_lease("p")
    assert_engine_empty(h.engine)


def test_runner_that_answers_wrongly_is_an_error_not_a_hang(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness()
    for answer in ([], [None]):
        h.runner.launch = lambda batch, answer=answer: CompletedStep(answer)
        h.submit("a", PROMPT[:4])
        h.run()
        assert h.records["a"].deltas[-1].finish_reason is FinishReason.ERROR
        h.records.clear()
    assert_engine_empty(h.engine)


def test_logprobs_travel_with_their_token(make_harness: Make) -> None:
    h = make_harness()
    entry = TokenLogprobs(5, -0.25, ((5, -0.25), (6, -1.5)))
    h.runner.launch = lambda batch: CompletedStep([SampledToken(5, entry)] * len(batch.scheduled))
    h.submit("a", PROMPT[:4], max_tokens=2)
    h.run()
    assert [d.logprobs for d in h.records["a"].deltas] == [[entry], [entry]]


def test_timeline_of_generate(make_harness: Make, depth: int) -> None:
    h = make_harness(max_num_seqs=1, max_num_batched_tokens=16)
    h.submit("first", PROMPT[:4], max_tokens=2)
    h.submit("a", PROMPT, max_tokens=3)
    h.run()
    points = h.records["a"].last.timeline.points
    start_s = 1000.0
    # Each step of the harness is 0.01 s, and results come one step later when two are in flight.
    late_s = 0.01 * (depth - 1)
    assert {event.name: round(at_s - start_s, 2) for event, at_s in points.items()} == {
        "PREFILL_QUEUED": 0.0,
        "PREFILL_STARTED": 0.03,
        "PREFILL_ENDED": round(0.04 + late_s, 2),
        "DECODE_STARTED": round(0.04 + late_s, 2),
        "DECODE_ENDED": round(0.06 + late_s, 2),
    }


def test_timeline_of_a_hand_off(make_harness: Make) -> None:
    p, d = make_harness(max_num_batched_tokens=64), make_harness()
    p.submit("a", PROMPT, work=Work.PREFILL, max_tokens=3)
    p.run()
    assert set(p.records["a"].last.timeline.points) == {
        LifecycleEvent.PREFILL_QUEUED,
        LifecycleEvent.PREFILL_STARTED,
        LifecycleEvent.PREFILL_ENDED,
    }
    d.submit("a", PROMPT, work=Work.DECODE, max_tokens=3)
    d.run()
    d.read_from(p, "a")
    moved = Timeline(
        {LifecycleEvent.TRANSFER_STARTED: 1.0, LifecycleEvent.TRANSFER_ENDED: 2.0},
        TransferStats(num_bytes=5, num_reads=1),
    )
    token_ids = p.records["a"].token_ids
    d.engine.activate("a", TokenDelta("a", token_ids=token_ids, timeline=moved))
    d.run()
    timeline = d.records["a"].last.timeline
    assert set(timeline.points) == {
        LifecycleEvent.DECODE_RESERVED,
        LifecycleEvent.TRANSFER_STARTED,
        LifecycleEvent.TRANSFER_ENDED,
        LifecycleEvent.DECODE_STARTED,
        LifecycleEvent.DECODE_ENDED,
    }
    assert timeline.transfer.num_bytes == 5


def test_load_report_counts_what_is_resident(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=64)
    h.submit("a", PROMPT, max_tokens=5)
    h.step()
    h.step()
    load = h.engine.load()
    assert (load.num_running, load.resident_kv_tokens) == (1, 23)
    assert (load.total_blocks, load.free_blocks) == (32, 26)
    h.engine.cancel("a")
    h.run()


def test_idle_step_returns_an_empty_output(make_harness: Make) -> None:
    h = make_harness()
    output = h.step()
    assert not (output.deltas or output.chunks or output.reservations or output.stored)
    assert not h.runner.batches and not h.engine.has_work


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mix_of_prompts_settings_and_pools_gives_the_reference_output(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make, data: st.DataObject
) -> None:
    block_size = data.draw(st.sampled_from([1, 2, 4, 8]))
    num_seqs = data.draw(st.integers(1, 4))
    h = make_harness(
        data.draw(st.integers(24 // block_size + 1, 60)),
        block_size=block_size,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=data.draw(st.integers(num_seqs, 30)),
        max_model_len=24,
    )
    requests = data.draw(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2), st.integers(1, 30)), max_size=8)
    )
    for i, (num_prompt_tokens, offset, max_tokens) in enumerate(requests):
        h.submit(f"r{i}", PROMPT[offset : offset + num_prompt_tokens], max_tokens=max_tokens)
    h.run()
    for i, (num_prompt_tokens, offset, max_tokens) in enumerate(requests):
        prompt = PROMPT[offset : offset + num_prompt_tokens]
        num_tokens = min(max_tokens, 24 - len(prompt))
        assert h.records[f"r{i}"].token_ids == expected_output(prompt, num_tokens)
    assert_engine_empty(h.engine)


def test_step_makes_the_same_calls_however_long_the_context_is(
    fake_runner: ModuleType, harness: ModuleType
) -> None:
    calls = []
    for num_prompt_tokens in (64, 4096):
        engine = harness.make_engine(
            fake_runner.CountingRunner(),
            num_blocks=10_000,
            block_size=16,
            max_num_seqs=32,
            max_num_batched_tokens=200_000,
            max_model_len=5000,
        )
        for i in range(32):
            prompt = [i, *range(num_prompt_tokens)]
            engine.submit(harness.make_request(f"r{i}", prompt, block_size=16, max_tokens=400))
        engine.step()
        calls.append(num_calls(engine.step, times=64))
    assert calls[0] == calls[1]


def num_calls(action: Callable[[], object], *, times: int) -> int:
    """Python and C function calls that `times` calls of `action` make."""
    count = 0

    def profile(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        for _ in range(times):
            action()
    finally:
        sys.setprofile(None)
    return count
