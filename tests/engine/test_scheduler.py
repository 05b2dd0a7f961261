"""Decisions of one step, seen through the batches that reach the runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from baton.core.errors import Overloaded
from baton.core.request import FinishReason, TokenDelta, Work
from baton.engine.scheduler import SchedulerLimits

Make = Callable[..., Any]


def prompt(num_tokens: int, first: int = 1) -> list[int]:
    return [(first + 7 * i) % 97 for i in range(num_tokens)]


def test_long_prompt_is_computed_in_chunks_of_the_budget(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=16)
    h.submit("a", prompt(40), max_tokens=2)
    h.run()
    assert h.runner.batches == [[("a", 16)], [("a", 16)], [("a", 8)], [("a", 1)]]


def test_decodes_come_first_and_prefill_takes_what_is_left(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=16)
    h.submit("a", prompt(5), max_tokens=10)
    h.step()
    h.submit("b", prompt(30, 2), max_tokens=4)
    h.step()
    assert h.runner.batches[-1] == [("a", 1), ("b", 15)]


def test_prefills_share_the_budget_first_come_first_served(make_harness: Make) -> None:
    h = make_harness(max_num_batched_tokens=16)
    for i, name in enumerate("abc"):
        h.submit(name, prompt(10, i), max_tokens=1)
    h.step()
    assert h.runner.batches == [[("a", 10), ("b", 6)]]
    h.step()
    assert h.runner.batches[-1] == [("b", 4), ("c", 10)]


def test_limits_change_between_steps_and_what_waits_is_known(make_harness: Make) -> None:
    h = make_harness(64, max_num_seqs=2, max_num_batched_tokens=16)
    for i in range(4):
        h.submit(f"r{i}", prompt(4, i), max_tokens=8)
    h.step()
    assert h.engine.waiting_ids() == ("r2", "r3")
    h.engine.set_limits(SchedulerLimits(3, 16, 8))
    h.step()
    assert len(h.runner.batches[-1]) == 3
    h.engine.set_limits(SchedulerLimits(1, 16, 8))
    h.step()
    assert h.runner.batches[-1] == [("r0", 1)]
    assert h.engine.waiting_ids() == ("r3",)
    h.run()
    assert all(h.records[f"r{i}"].finish_reason is FinishReason.LENGTH for i in range(4))


def test_no_more_than_max_num_seqs_compute_in_one_step(make_harness: Make) -> None:
    h = make_harness(64, max_num_seqs=3, max_num_batched_tokens=64)
    for i in range(7):
        h.submit(f"r{i}", prompt(4, i), max_tokens=3)
    h.run()
    assert max(map(len, h.runner.batches)) == 3
    assert all(r.finish_reason is FinishReason.LENGTH for r in h.records.values())


def test_admission_waits_until_blocks_suffice_and_nobody_overtakes(make_harness: Make) -> None:
    h = make_harness(8, max_num_batched_tokens=64, max_model_len=32)
    h.submit("a", prompt(20), max_tokens=4)
    h.step()
    h.submit("big", prompt(16, 2), max_tokens=2)
    h.submit("small", prompt(3, 3), max_tokens=2)
    h.step()
    assert h.engine.load().num_waiting == 2
    h.run()
    order = [name for batch in h.runner.batches for name, _ in batch]
    assert order.index("big") < order.index("small")


@pytest.mark.parametrize("works", [(Work.GENERATE, Work.DECODE), (Work.DECODE, Work.GENERATE)])
def test_order_of_arrival_holds_across_kinds_of_work(make_harness: Make, works: Any) -> None:
    h = make_harness(8, max_num_batched_tokens=64, max_model_len=32)
    h.submit("a", prompt(16), max_tokens=2)
    h.step()
    h.submit("first", prompt(20, 2), work=works[0], max_tokens=2)
    h.submit("second", prompt(2, 3), work=works[1], max_tokens=2)
    h.step()
    assert h.engine.load().num_waiting == 2, "second would fit but came later"
    h.run()
    assert h.engine.load().num_waiting == 0


def test_latest_arrival_is_preempted_and_its_output_is_unchanged(
    make_harness: Make, expected_output: Make
) -> None:
    h = make_harness(6, max_num_batched_tokens=32, max_model_len=24)
    h.submit("old", prompt(8), max_tokens=12)
    h.submit("new", prompt(8, 2), max_tokens=12)
    h.run()
    assert h.engine.load().num_preemptions > 0
    for name, first in (("old", 1), ("new", 2)):
        assert h.records[name].token_ids == expected_output(prompt(8, first), 12)
    num_computed = sum(n for b in h.runner.batches for name, n in b if name == "old")
    assert num_computed == 8 + 11, "the oldest sequence is never computed again"


def test_sequence_alone_ends_at_the_pools_capacity_instead_of_thrashing(
    make_harness: Make, expected_output: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(3, max_model_len=1000)
    h.submit("a", prompt(5), max_tokens=500)
    h.run()
    assert h.records["a"].finish_reason is FinishReason.LENGTH
    assert h.records["a"].token_ids == expected_output(prompt(5), 7)
    assert_engine_empty(h.engine)


def test_prefill_work_is_never_preempted(make_harness: Make) -> None:
    h = make_harness(8, max_num_batched_tokens=3, max_num_seqs=2, max_model_len=32)
    h.submit("g", prompt(4), max_tokens=24)
    h.step()
    h.step()
    h.submit("p", prompt(20, 2), work=Work.PREFILL)
    h.run()
    assert h.engine.load().num_preemptions > 0
    assert sum(n for b in h.runner.batches for name, n in b if name == "p") == 20
    assert h.records["g"].finish_reason is None, "g waits for the leased blocks"
    h.engine.release_lease("p")
    h.run()
    assert h.records["g"].finish_reason is FinishReason.LENGTH


def test_reservations_are_never_preempted(make_harness: Make) -> None:
    h = make_harness(6, max_num_batched_tokens=16, max_model_len=24)
    h.submit("d", prompt(16, 3), work=Work.DECODE)
    h.submit("g", prompt(3), max_tokens=12)
    h.run()
    assert h.records["d"].reservation is not None
    assert not h.engine.has_work, "stalled until the reservation resolves"
    assert h.engine.load().reservations == 1
    h.engine.abandon("d", unsettled=())
    assert h.engine.has_work
    h.run()
    assert h.records["g"].finish_reason is FinishReason.LENGTH


def test_reservations_are_granted_in_order_of_arrival(make_harness: Make) -> None:
    h = make_harness(8, max_model_len=32)
    h.submit("d0", prompt(20, 3), work=Work.DECODE)
    h.submit("d1", prompt(20, 4), work=Work.DECODE)
    h.submit("d2", prompt(2, 5), work=Work.DECODE)
    h.run()
    granted = [name for name, r in h.records.items() if r.reservation]
    assert granted == ["d0"], "d2 would fit but would starve d1"
    h.engine.abandon("d0", unsettled=())
    h.run()
    granted = [name for name, r in h.records.items() if r.reservation]
    assert granted == ["d0", "d1", "d2"]


def test_reservation_needs_no_place_and_no_tokens(make_harness: Make) -> None:
    h = make_harness(32, max_num_seqs=1, max_num_batched_tokens=4)
    h.submit("g", prompt(20), max_tokens=2)
    h.submit("waits", prompt(20, 2), max_tokens=2)
    h.submit("d", prompt(20, 3), work=Work.DECODE)
    h.step()
    assert h.records["d"].reservation is not None
    assert h.engine.load().num_waiting == 1


def test_activated_sequences_beyond_max_num_seqs_keep_their_kv(make_harness: Make) -> None:
    h = make_harness(32, max_num_seqs=2, max_num_batched_tokens=8)
    p = make_harness(32, max_num_batched_tokens=64)
    for i in range(4):
        p.submit(f"d{i}", prompt(9, i), work=Work.PREFILL, max_tokens=4)
        h.submit(f"d{i}", prompt(9, i), work=Work.DECODE, max_tokens=4)
    p.run()
    h.run()
    for i in range(4):
        h.read_from(p, f"d{i}")
        h.engine.activate(f"d{i}", p.records[f"d{i}"].chunks[-1].first_token)
    h.run()
    assert max(map(len, h.runner.batches)) == 2
    assert all(n == 1 for batch in h.runner.batches for _, n in batch), "nothing is recomputed"


def test_sequence_without_a_place_goes_on_when_the_one_before_it_is_preempted(
    make_harness: Make, assert_engine_empty: Make
) -> None:
    h = make_harness(5, max_num_seqs=1, max_num_batched_tokens=4, max_model_len=20)
    for i in (0, 1):
        h.submit(f"d{i}", prompt(8, i), work=Work.DECODE, max_tokens=8, is_cached=False)
    h.step()
    for i in (1, 0):
        blocks = h.records[f"d{i}"].reservation.block_ids
        p = make_harness(4)
        p.submit("p", prompt(8, i), work=Work.PREFILL)
        p.run()
        h.runner.write_blocks(blocks, p.runner.read_blocks(p.records["p"].announced))
        h.engine.activate(f"d{i}", p.records["p"].chunks[-1].first_token)
    while not h.engine.load().num_preemptions:
        h.step()
    assert h.runner.batches[-1] != [], "the runner is never called for nothing"
    assert h.engine.load().num_running == 1 and h.engine.has_work
    h.run()
    assert {r.finish_reason for r in h.records.values()} == {FinishReason.LENGTH}
    assert_engine_empty(h.engine)


def test_queue_is_bounded(make_harness: Make) -> None:
    h = make_harness(max_num_waiting=2, max_num_seqs=1)
    h.submit("a", prompt(4))
    h.submit("b", prompt(4))
    with pytest.raises(Overloaded, match="2 requests wait on this worker, the limit is 2"):
        h.submit("c", prompt(4))
    h.step()
    h.submit("c", prompt(4))
    h.run()
    assert h.records["c"].finish_reason is FinishReason.LENGTH


def test_one_block_stays_available_for_each_growing_sequence(make_harness: Make) -> None:
    h = make_harness(8, max_num_batched_tokens=64, max_model_len=32)
    h.submit("a", prompt(8), max_tokens=10)
    h.step()
    h.submit("b", prompt(20, 2), max_tokens=2)
    h.run()
    assert h.engine.load().num_preemptions == 0, "the last block was for a"


def test_queued_prefill_tokens_count_down_with_the_chunks(make_harness: Make) -> None:
    h = make_harness(max_num_seqs=1, max_num_batched_tokens=16)
    h.submit("a", prompt(40), max_tokens=2)
    h.submit("b", prompt(10, 2), max_tokens=2)
    h.submit("d", prompt(10, 3), work=Work.DECODE)
    seen = [h.engine.load().queued_prefill_tokens]
    for _ in range(4):
        h.step()
        seen.append(h.engine.load().queued_prefill_tokens)
    assert seen == [50, 34, 18, 10, 10]


def test_preempted_decode_work_is_computed_again_here(
    make_harness: Make, expected_output: Make
) -> None:
    h = make_harness(6, max_num_batched_tokens=16, max_model_len=24)
    h.submit("g", prompt(4), max_tokens=16)
    h.step()
    h.submit("d", prompt(8, 2), work=Work.DECODE, max_tokens=12)
    h.step()
    p = make_harness(8)
    p.submit("d", prompt(8, 2), work=Work.PREFILL, max_tokens=12)
    p.run()
    h.read_from(p, "d")
    first: TokenDelta = p.records["d"].chunks[-1].first_token
    h.engine.activate("d", first)
    h.run()
    assert h.engine.load().num_preemptions > 0
    assert first.token_ids + h.records["d"].token_ids == expected_output(prompt(8, 2), 12)
