"""One request against its targets."""

from __future__ import annotations

import pytest

from baton.core.worker_info import WorkerId
from services.router.admission.judge import Judge, Verdict
from services.router.admission.slo import SloTargets
from services.router.admission.ticket import Prospect, Refusal, Ticket
from services.router.placement.placement import Prediction


def judge_of(**kw: float) -> Judge:
    return Judge(**{"max_ahead_s": 0.5, "shed_ratio": 0.8, "calm_s": 5.0, **kw})


def prospect(predicted: Prediction, *, alone_itl_s: float = 0.0, decode: str = "d0") -> Prospect:
    return Prospect(
        predicted, 100, alone_itl_s=alone_itl_s, decode=WorkerId(decode), itl_relief_s=0.001
    )


def ticket_of(ttft_s: float | None = 1.0, itl_s: float | None = None) -> Ticket:
    return Ticket("a", 100, targets=SloTargets(ttft_s, itl_s))


def test_admitted_when_all_is_predicted_in_time():
    judgement = judge_of().judge(
        ticket_of(), prospect(Prediction(0.9, 0.01, 0.4)), 0.0, is_arriving=True
    )
    assert judgement.verdict is Verdict.ADMIT


@pytest.mark.parametrize(("ttft_s", "excess_s"), [(1.2, 0.2), (5.0, 0.4)])
def test_rejected_when_the_first_token_comes_too_late(ttft_s, excess_s):
    judgement = judge_of().judge(
        ticket_of(), prospect(Prediction(ttft_s, 0.01, 0.4)), 0.0, is_arriving=True
    )
    assert judgement.verdict is Verdict.REJECT and judgement.reason is Refusal.TTFT
    # Never more than what is ahead: without that it is admitted.
    assert judgement.excess_s == pytest.approx(excess_s)


def test_waiting_counts_like_everything_else():
    judge, ticket = judge_of(), ticket_of()
    assert judge.judge(ticket, prospect(Prediction(0.6, 0.0, 0.3)), 0.3).verdict is Verdict.ADMIT
    late = judge.judge(ticket, prospect(Prediction(0.6, 0.0, 0.3)), 0.5)
    assert (late.verdict, late.reason) == (Verdict.REJECT, Refusal.LATE)
    assert (
        judge.judge(ticket, prospect(Prediction(0.6, 0.0, 0.3)), 0.0, wait_s=0.5).reason
        is Refusal.LATE
    )


def test_idle_worker_is_never_refused_for_a_prediction():
    # Nothing is ahead of it: it would find the same next time, or the prediction is wrong.
    judgement = judge_of().judge(
        ticket_of(0.1, 0.001), prospect(Prediction(9.0, 9.0)), 0.0, is_arriving=True
    )
    assert judgement.verdict is Verdict.ADMIT


def test_too_slow_a_batch_is_waited_for():
    judge = judge_of()
    running = ticket_of(None, 0.05)
    judge.judge(running, prospect(Prediction(0.1, 0.01)), 0.0)
    judge.started(running)
    slow = Prediction(0.1, 0.06)
    assert judge.judge(ticket_of(None, 0.05), prospect(slow), 0.0).reason is Refusal.ITL
    # The batch is one: those without targets must not slow it down either.
    assert judge.judge(ticket_of(None, None), prospect(slow), 0.0).verdict is Verdict.WAIT
    judge.ended(running)
    assert judge.judge(ticket_of(None, None), prospect(slow), 0.0).verdict is Verdict.ADMIT
    judge.check_integrity()


def test_a_pace_that_nobody_could_keep_is_promised_to_nobody():
    judge, slow = judge_of(), Prediction(0.1, 0.06)
    hasty = ticket_of(None, 1e-6)
    # It neither waits for all others to end,
    other = ticket_of(None)
    judge.judge(other, prospect(slow), 0.0)
    judge.started(other)
    assert judge.judge(hasty, prospect(slow, alone_itl_s=0.01), 0.0).verdict is Verdict.ADMIT
    # nor do others wait until it has.
    judge.started(hasty)
    assert judge.judge(ticket_of(None), prospect(slow), 0.0).verdict is Verdict.ADMIT
    judge.ended(hasty)
    judge.check_integrity()
    assert (
        judge.judge(ticket_of(None, 0.02), prospect(slow, alone_itl_s=0.01), 0.0).reason
        is Refusal.ITL
    )


@pytest.mark.parametrize("predicted", [Prediction(0.7, 0.0, 0.6), Prediction(0.1, 0.0, 0.0, True)])
def test_waits_here_rather_than_in_the_queue_of_a_worker(predicted):
    assert judge_of().judge(ticket_of(None), prospect(predicted), 0.0).verdict is Verdict.WAIT


def test_after_a_rejection_arrivals_need_some_reserve_and_those_that_wait_do_not():
    judge = judge_of()
    predicted = Prediction(0.9, 0.0, 0.4)
    judge.shed(100.0)
    waited = Ticket("a", 100, targets=SloTargets(1.0), arrived_at_s=101.0)
    assert (
        judge.judge(waited, prospect(predicted), 101.0, is_arriving=True).verdict is Verdict.REJECT
    )
    assert judge.judge(waited, prospect(predicted), 101.0).verdict is Verdict.ADMIT
    calm = Ticket("a", 100, targets=SloTargets(1.0), arrived_at_s=105.0)
    assert not judge.is_shedding(105.0)
    assert judge.judge(calm, prospect(predicted), 105.0, is_arriving=True).verdict is Verdict.ADMIT


def test_margin_learned_from_late_ones_is_kept_from_the_next():
    judge, ticket = judge_of(), ticket_of()
    predicted = Prediction(0.9, 0.0, 0.4)
    for _ in range(20):
        judge.judge(ticket, prospect(predicted), 0.0)
        judge.learn(ticket, ttft_s=1.3, mean_itl_s=None)
    assert judge.judge(ticket_of(), prospect(predicted), 0.0).verdict is Verdict.REJECT


def test_promises_of_one_decode_worker_do_not_bind_another():
    judge = judge_of()
    running = ticket_of(None, 0.05)
    judge.judge(running, prospect(Prediction(0.1, 0.01)), 0.0)
    judge.started(running)
    other = ticket_of(None, None)
    judge.judge(other, prospect(Prediction(0.1, 0.01), decode="d1"), 0.0)
    judge.started(other)
    slow = Prediction(0.1, 0.06)
    assert judge.judge(ticket_of(None), prospect(slow), 0.0).verdict is Verdict.WAIT
    elsewhere = judge.judge(ticket_of(None), prospect(slow, decode="d1"), 0.0)
    assert elsewhere.verdict is Verdict.ADMIT
    for ticket in (running, other):
        judge.ended(ticket)
    judge.check_integrity()
    assert not judge.num_running


def test_says_how_many_sequences_have_to_end_first():
    judge = judge_of()
    running = ticket_of(None, 0.05)
    judge.judge(running, prospect(Prediction(0.1, 0.01)), 0.0)
    judge.started(running)
    for itl_s, num_over in ((0.0505, 1), (0.0535, 4)):
        judgement = judge.judge(ticket_of(None, 0.05), prospect(Prediction(0.1, itl_s)), 0.0)
        assert judgement.num_over == num_over


def test_batch_that_fills_up_to_what_was_promised_needs_no_margin():
    judge, ticket = judge_of(), ticket_of(None, 0.05)
    for _ in range(100):
        judge.judge(ticket, prospect(Prediction(0.1, 0.02)), 0.0)
        judge.learn(ticket, ttft_s=None, mean_itl_s=0.049)
    assert judge.itl_margin.margin_s == 0.0
    judge.learn(ticket, ttft_s=None, mean_itl_s=0.055)
    assert judge.itl_margin.margin_s > 0.0
