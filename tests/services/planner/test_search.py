"""Plans by simulation: what a pool can take, which pools go together, what cannot be had."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.errors import ConfigError
from baton.simulator.arrivals import RequestLengths
from baton.simulator.outcome import Outcome
from made_up_worker import HARDWARE, MODEL
from services.planner.candidate import Candidate, Layout, Pool, alone, cluster_of
from services.planner.goodput import GoodputSearch
from services.planner.objective import Objective, attainment
from services.planner.search import NO_LOCAL_PREFILL, Question, num_searches, search
from services.planner.values import chart_values
from services.planner.workload import SampledLengths

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
