"""Admission in front of the whole platform, in virtual time: three times what it can do."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.hardware import Hardware
from baton.simulator.outcome import Outcome
from baton.simulator.workload import Arrival
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo import SloTargets

TTFT_S, ITL_S, PROMPT_S = 1.0, 0.05, 0.05
HARDWARE = Hardware(
    step_fixed_s=0.010,
    prefill_token_s=100e-6,
    prefill_pair_s=0.0,
    decode_sequence_s=0.002,
    decode_kv_token_s=0.0,
)
PREFILL_BOUND, DECODE_BOUND = (1000, 32, 18.0), (100, 200, 4.0)
"""Mean prompt, mean output, requests per second that two and two workers can do in time."""
LONG = 4096


def arrivals(workload, load, seconds, seed, *, start_s=0.0, first=0, bound=0) -> list[Arrival]:
    mean_prompt, mean_output, capacity = workload
    rng, at_s, made = random.Random(seed), start_s, []
    while (at_s := at_s + rng.expovariate(load * capacity)) < start_s + seconds:
        num_prompt = max(16, int(rng.gauss(mean_prompt, mean_prompt / 4)))
        num_output = rng.randint(2, 2 * mean_output - 2)
        made.append(
            Arrival(
                first + len(made), at_s, num_prompt, num_output, (),
                targets=SloTargets(TTFT_S, ITL_S), max_output_tokens=bound,
            )
        )  # fmt: skip
    return made


def run(requests: list[Arrival], **values) -> tuple[SimCluster, list[Outcome]]:
    sizes = {"num_prefill": 2, "num_decode": 2, "num_blocks": 8000, "block_size": 16}
    layout = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
    config = ClusterConfig(
        **sizes, **layout, hardware=HARDWARE, prefill_max_num_batched_tokens=512, **values
    )
    cluster = SimCluster(config)
    return cluster, cluster.run(requests)


def is_kept(outcome: Outcome) -> bool:
    itl_s = outcome.itl_s
    return outcome.ttft_s <= TTFT_S and (itl_s is None or itl_s <= ITL_S)


def goodput(outcomes: list[Outcome]) -> int:
    return sum(o.refused_s is None and is_kept(o) for o in outcomes)


def suddenly(workload, seed, *, bound=0) -> tuple[SimCluster, list[Outcome], int]:
    """Short outputs for a while, then the workload at three times the capacity."""
    before = arrivals(PREFILL_BOUND, 1.0, 10.0, seed + 50)
    requests = arrivals(workload, 3.0, 40.0, seed, start_s=10.0, first=len(before), bound=bound)
    cluster, outcomes = run([*before, *requests], admission=AdmissionConfig())
    return cluster, outcomes[len(before) :], len(requests)


@pytest.mark.parametrize("bound", [0, LONG], ids=["lengths are told", "lengths are not told"])
@pytest.mark.parametrize("workload", [PREFILL_BOUND, DECODE_BOUND], ids=["prefill", "decode"])
def test_sudden_overload_is_told_at_once_and_what_is_admitted_keeps_its_targets(workload, bound):
    cluster, outcomes, _ = suddenly(workload, 1, bound=bound)
    served = [o for o in outcomes if o.refused_s is None]
    told_s = [o.refused_s - o.arrived_s for o in outcomes if o.refused_s is not None]
    assert sum(map(is_kept, served)) >= 0.95 * len(served)
    # Lengths of another kind of work are expected until these have shown theirs.
    assert sum(s <= PROMPT_S for s in told_s) >= (0.99 if not bound else 0.97) * len(told_s)
    assert max(told_s) <= TTFT_S
    assert max(door.max_queued for door in cluster.doors) <= 12


@pytest.mark.parametrize(
    ("workload", "limits"),
    [(PREFILL_BOUND, (16, 20, 24)), (DECODE_BOUND, (34, 36, 38))],
    ids=["prefill", "decode"],
)
def test_it_gets_as_much_through_as_the_best_fixed_limit(workload, limits):
    requests = arrivals(workload, 3.0, 60.0, 3, bound=LONG)
    static = [goodput(run(requests, max_concurrent=limit)[1]) for limit in limits]
    assert goodput(run(requests, admission=AdmissionConfig())[1]) >= 0.9 * max(static)


def test_requests_of_all_lengths_get_in():
    """None is preferred for being longer, or for being shorter."""
    _, outcomes, _ = suddenly(DECODE_BOUND, 3)
    lengths = [o.num_output_tokens for o in outcomes if o.refused_s is None]
    assert statistics.mean(lengths) == pytest.approx(200, rel=0.1)


def test_what_runs_settles_and_does_not_swing():
    requests = arrivals(DECODE_BOUND, 3.0, 60.0, 4, bound=LONG)
    _, outcomes = run(requests, admission=AdmissionConfig())
    served = [o for o in outcomes if o.refused_s is None]
    running = [sum(o.arrived_s <= at_s < o.last_token_s for o in served) for at_s in range(15, 60)]
    assert min(running) >= 0.6 * statistics.mean(running)
    steps = [abs(b - a) for a, b in itertools.pairwise(running)]
    assert statistics.mean(steps) <= 0.15 * statistics.mean(running)


def test_two_copies_that_do_not_talk_get_as_much_through_as_one():
    requests = arrivals(DECODE_BOUND, 3.0, 40.0, 5, bound=LONG)
    one, two = (run(requests, num_routers=n, admission=AdmissionConfig())[1] for n in (1, 2))
    assert goodput(two) >= 0.85 * goodput(one)
    served = [o for o in two if o.refused_s is None]
    assert sum(map(is_kept, served)) >= 0.9 * len(served)


def test_below_its_capacity_everybody_is_let_in():
    _, outcomes = run(arrivals(DECODE_BOUND, 0.7, 40.0, 6), admission=AdmissionConfig())
    refused = [o for o in outcomes if o.refused_s is not None]
    assert len(refused) <= 0.02 * len(outcomes)


def test_fixed_limit_refuses_at_once_and_only_beyond_it():
    requests = arrivals(DECODE_BOUND, 3.0, 20.0, 7)
    _, outcomes = run(requests, max_concurrent=5)
    assert any(o.refused_s is not None for o in outcomes)
    assert all(o.refused_s in (None, o.arrived_s) for o in outcomes)
    for outcome in outcomes[:5]:
        assert outcome.refused_s is None
