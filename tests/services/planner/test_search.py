"""Plans by simulation: what a pool can take, which pools go together, what cannot be had."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.errors import ConfigError
from baton.simulator.arrivals import RequestLengths, sampled, sharing
from baton.simulator.outcome import Outcome
from made_up_worker import HARDWARE, MODEL
from services.planner.candidate import Candidate, Layout, Pool, alone, cluster_of
from services.planner.goodput import GoodputSearch
from services.planner.objective import Objective, attainment
from services.planner.search import NO_LOCAL_PREFILL, Question, num_searches, search
from services.planner.values import chart_values
from services.planner.workload import Replay, SampledLengths

LAYOUT = Layout(block_size=64, kv_bytes_per_token=800_000, max_model_len=1024)
OBJECTIVE = Objective(ttft_s=0.4, itl_s=0.04)
WORK = SampledLengths("512/16", (RequestLengths(512, 16),), 64)


def goodput_of(candidate: Candidate, objective: Objective = OBJECTIVE) -> tuple[float, str]:
    searched = GoodputSearch(WORK, objective, tolerance=0.1, min_requests=100, span_s=5)
    found = searched.run(cluster_of(candidate, LAYOUT, 0, NO_LOCAL_PREFILL), 4.0)
    return found.rate_per_s, found.limit


def test_a_prefill_worker_alone_is_bound_by_its_queue() -> None:
    rate, limit = goodput_of(alone(Pool(MODEL, 1), is_prefill=True, max_step_tokens=2048))
    seconds = HARDWARE.step_fixed_s + 512 * HARDWARE.prefill_token_s
    assert 0.5 / seconds < rate < 1.3 / seconds
    assert limit == "ttft"


def test_a_decode_worker_alone_is_bound_by_the_batch_that_keeps_its_pace() -> None:
    rate, limit = goodput_of(alone(Pool(MODEL, 1), is_prefill=False, max_step_tokens=2048))
    per_sequence = HARDWARE.decode_sequence_s + 520 * HARDWARE.decode_kv_token_s
    batch = (OBJECTIVE.itl_s - HARDWARE.step_fixed_s) / per_sequence
    fitting = batch / (16 * OBJECTIVE.itl_s)
    assert 0.6 * fitting < rate < 1.2 * fitting
    assert limit == "itl"


def test_an_objective_out_of_reach_has_no_goodput_and_says_which() -> None:
    slow = Objective(ttft_s=10, itl_s=0.001)
    rate, limit = goodput_of(alone(Pool(MODEL, 1), is_prefill=False, max_step_tokens=2048), slow)
    assert (rate, limit) == (0.0, "itl")


def question(**changes: object) -> Question:
    base = Question(WORK, OBJECTIVE, {1: MODEL}, {1: MODEL}, LAYOUT, 2, min_requests=40, span_s=2)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_a_search_ranks_pairs_and_colocated_workers_and_says_why() -> None:
    told: list[str] = []
    plan = search(question(), on_run=told.append)
    rates = [ranked.rate_per_device for ranked in plan.ranking]
    assert rates == sorted(rates, reverse=True)
    assert any(ranked.candidate.prefill is None for ranked in plan.ranking)
    assert any(ranked.candidate.prefill is not None for ranked in plan.ranking)
    assert all(ranked.candidate.num_devices <= 2 for ranked in plan.ranking)
    assert all(ranked.reason for ranked in plan.ranking + plan.pools_alone)
    assert plan.chosen == plan.ranking[0]
    assert len(told) == len(set(told)) <= num_searches(question())


def test_equal_seeds_give_equal_searches() -> None:
    candidate = alone(Pool(MODEL, 1), is_prefill=True, max_step_tokens=2048)
    config = cluster_of(candidate, LAYOUT, 0, NO_LOCAL_PREFILL)

    def found() -> object:
        searched = GoodputSearch(WORK, OBJECTIVE, tolerance=0.5, min_requests=30, span_s=1)
        return searched.run(config, 8.0)

    assert found() == found()


def test_nothing_is_chosen_when_nothing_keeps_the_objective() -> None:
    plan = search(question(objective=Objective(ttft_s=0.01, itl_s=0.001)))
    assert plan.chosen is None
    assert all("misses" in ranked.reason for ranked in plan.ranking)


def test_what_can_be_had_instead_is_named_with_who_can() -> None:
    impossible = Objective(ttft_s=0.01, itl_s=0.001)
    faster = dataclasses.replace(
        MODEL, tensor_parallel=2, hardware=dataclasses.replace(HARDWARE, step_fixed_s=0.01)
    )
    models = {1: MODEL, 2: faster}
    plan = search(question(objective=impossible, prefill_models=models, decode_models=models))
    ttft, itl = plan.shortfalls(impossible)
    assert (ttft.target, ttft.best.title) == ("TTFT", "prefill, tp2")
    assert (itl.target, itl.best.title) == ("ITL", "decode, tp2")
    alone_s = 0.01 + 512 * HARDWARE.prefill_token_s
    assert alone_s < ttft.best_s < 1.2 * alone_s
    assert 0.01 < itl.best_s < 0.013


def traces() -> tuple[Replay, Replay]:
    """Prompts of which most is one of four texts; and the same lengths with nothing shared."""
    lengths = (RequestLengths(1024, 24), RequestLengths(1536, 16))
    drawn = sampled(lengths, rate_per_s=1, num_requests=400, block_size=64, seed=2)
    trace = Replay("t", sharing(drawn, num_prefixes=4, share=0.85, block_size=64))
    return trace, trace.without_sharing(64)


def test_hits_multiply_what_a_prefill_worker_takes() -> None:
    trace, alone_trace = traces()
    assert [len(a.block_hashes) for a in alone_trace.arrivals(1, 400, 0)] == [
        len(a.block_hashes) for a in trace.arrivals(1, 400, 0)
    ]
    candidate = alone(Pool(MODEL, 1), is_prefill=True, max_step_tokens=2048)
    layout = dataclasses.replace(LAYOUT, max_model_len=2048)
    config = cluster_of(candidate, layout, 0, NO_LOCAL_PREFILL)
    hits, none = (
        GoodputSearch(work, OBJECTIVE, tolerance=0.3, min_requests=60, span_s=2).run(config, 4.0)
        for work in (trace, alone_trace)
    )
    assert hits.rate_per_s > 3 * none.rate_per_s > 0


@pytest.mark.slow
def test_hits_change_the_plan_that_the_same_lengths_get_without_them() -> None:
    layout = dataclasses.replace(LAYOUT, max_model_len=2048)

    def best_pair(workload: Replay) -> tuple[int, int]:
        plan = search(
            question(workload=workload, layout=layout, max_devices=4, min_requests=100, span_s=2)
        )
        best = next(r.candidate for r in plan.ranking if r.candidate.prefill is not None)
        assert best.prefill is not None
        return best.prefill.num_workers, best.decode.num_workers

    assert [best_pair(trace) for trace in traces()] == [(1, 1), (3, 1)]


def test_one_device_is_planned_for_with_colocated_workers_only() -> None:
    plan = search(question(max_devices=1))
    assert plan.ranking
    assert all(ranked.candidate.prefill is None for ranked in plan.ranking)


def test_attainment_counts_those_that_never_ended_and_single_tokens() -> None:
    outcomes = [
        Outcome(0, 0.0, 10, first_token_s=0.3, last_token_s=0.3, num_output_tokens=1),
        Outcome(1, 0.0, 10, first_token_s=0.3, last_token_s=1.3, num_output_tokens=2),
        Outcome(2, 0.0, 10, first_token_s=0.9, last_token_s=0.91, num_output_tokens=2),
        Outcome(3, 0.0, 10),
    ]
    share = attainment(outcomes, OBJECTIVE)
    assert (share.ttft, share.itl, share.both) == (0.5, 0.5, 0.25)
    assert not share.meets(OBJECTIVE)


def test_values_are_what_the_chart_takes() -> None:
    two = dataclasses.replace(MODEL, tensor_parallel=2)
    values = chart_values(
        Candidate(Pool(MODEL, 4), Pool(two, 1), 2048), block_size=64, num_copies=3
    )
    assert values["pools"]["paired"] == {"replicas": 3, "prefill": 4, "decode": 1}
    assert values["config"]["decode"]["engine"]["tp_size"] == 2
    with pytest.raises(ConfigError, match="not a colocated one"):
        chart_values(Candidate(None, Pool(MODEL, 1), 512), block_size=64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_devices": 0}, "at least 1 device, got 0"),
        ({"prefill_models": {}}, "no size of worker"),
        ({"decode_models": {4: MODEL}}, "decode workers need at least 4 devices and 2 may be"),
        (
            {"decode_models": {1: dataclasses.replace(MODEL, max_kv_tokens=500)}},
            "longest request has 528 tokens, the largest decode worker .* has room .* of 500",
        ),
    ],
)
def test_impossible_questions_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        question(**change)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((0, 1), "ttft_s must be above 0"), ((1, -1), "itl_s must be above 0"), ((1, 1, 1), "share")],
)
def test_impossible_objectives_are_refused(arguments: tuple[float, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Objective(*arguments)
