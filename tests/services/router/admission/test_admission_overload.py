"""Admission in front of two pools in virtual time, offered three times what they can do."""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable

import pytest

from services.router.admission.admission import Lane
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo import SloTargets
from services.router.admission.ticket import Ticket
from tests.support.two_pools import Job, TwoPools, poisson

TTFT_S, ITL_S = 1.0, 0.05
TARGETS = SloTargets(TTFT_S, ITL_S)
WARM_UP_S, DURATION_S = 5.0, 45.0
# Prompts of 1000 tokens: prefill does 10 a second. Outputs of 256 tokens: decode does 6 a second.
PREFILL_BOUND, DECODE_BOUND = (1000, 64, 10.0), (200, 256, 6.25)


def new_lane() -> Lane:
    return Lane(AdmissionConfig(), max_ahead_s=TTFT_S / 2, worker_wait_s=1.0)


def new_job(at_s: float, prompt: int, output: int, tenant: str = "a", weight: float = 1.0) -> Job:
    ticket = Ticket(
        tenant, 1.0, due_at_s=at_s + TTFT_S, weight=weight, slo_class="x", targets=TARGETS,
        arrived_at_s=at_s, num_prompt_tokens=prompt, num_output_tokens=4096,
    )  # fmt: skip
    return Job(ticket, output, at_s)


def random_job(at_s: float, mean_prompt: int, mean_output: int, rng: random.Random, **kw) -> Job:
    prompt = max(16, int(rng.expovariate(1 / mean_prompt)))
    return new_job(at_s, prompt, max(2, int(rng.expovariate(1 / mean_output))), **kw)


def overload(
    workload: tuple[int, int, float],
    *,
    factor: float = 3.0,
    seed: int = 1,
    error: Callable[[], float] = lambda: 1.0,
    uses_forecast: bool = True,
) -> TwoPools:
    mean_prompt, mean_output, capacity = workload
    rng = random.Random(seed)
    pools = TwoPools(new_lane(), error=error, uses_forecast=uses_forecast)
    times = poisson(factor * capacity, DURATION_S, rng)
    arrivals = [(t, random_job(t, mean_prompt, mean_output, rng)) for t in times]
    pools.run(arrivals, until_s=DURATION_S + 60)
    assert len(pools.ended) + len(pools.refused) == len(arrivals), "somebody is left behind"
    assert not pools.lane.queue and not pools.lane.num_admitted
    pools.lane.check_integrity()
    return pools


def attainment(pools: TwoPools) -> float:
    met = sum(j.ttft_s <= TTFT_S and j.itl_s <= ITL_S for j in pools.ended)
    return met / len(pools.ended)


def per_second(times: list[float]) -> list[int]:
    counts = Counter(int(t) for t in times)
    return [counts[s] for s in range(int(WARM_UP_S), int(DURATION_S))]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("workload", [PREFILL_BOUND, DECODE_BOUND])
def test_admitted_requests_keep_their_targets_and_the_platform_is_used(workload, seed):
    pools = overload(workload, seed=seed)
    assert attainment(pools) >= 0.95
    # Short prompts fit where long ones do not, so more than the mean request's rate is possible.
    assert len(pools.admitted_at_s) >= 0.85 * workload[2] * DURATION_S
    assert pools.max_queued <= 40, "the queue grows with the load"


def test_rejections_come_on_arrival():
    for workload in (PREFILL_BOUND, DECODE_BOUND):
        pools = overload(workload)
        waited_s = sorted(at_s - ticket.arrived_at_s for at_s, ticket in pools.refused)
        assert waited_s[int(0.95 * len(waited_s))] == pytest.approx(0.0, abs=0.01)
        assert waited_s[-1] <= TTFT_S + 0.01


@pytest.mark.parametrize("workload", [PREFILL_BOUND, DECODE_BOUND])
def test_admission_settles_and_does_not_swing(workload):
    mean_prompt, mean_output, capacity = workload
    pools = TwoPools(new_lane())
    rng = random.Random(3)
    times = poisson(3 * capacity, 60, rng)
    jobs = [(t, random_job(t, mean_prompt, mean_output, rng)) for t in times]
    running: list[int] = []
    queued_s: list[float] = []
    for at_s in range(20, 60):
        now = [job for job in jobs if job[0] <= at_s]
        jobs = jobs[len(now) :]
        pools.run(now, until_s=at_s)
        running.append(pools.lane.num_admitted)
        queued_s.append(max(sum(float(i[1]) for i in q) * pools.token_s for q in pools.prefill))
    bottleneck = queued_s if workload is PREFILL_BOUND else running
    steps = [abs(b - a) for a, b in itertools.pairwise(bottleneck)]
    # A swing between all and nothing goes through the whole range within a few seconds.
    assert statistics.mean(steps) <= 0.4 * statistics.mean(bottleneck)
    assert min(bottleneck) >= 0.2 * statistics.mean(bottleneck)
    admitted = [s for s in per_second(pools.admitted_at_s) if s]
    assert len(admitted) >= 0.85 * (DURATION_S - WARM_UP_S), "seconds in which nobody gets in"


@pytest.mark.parametrize(
    "factor", [0.6, 1.6, "noise"], ids=["too hopeful", "too gloomy", "both by turns"]
)
def test_wrong_predictions_are_made_up_for(factor):
    rng = random.Random(5)
    error = (lambda: rng.uniform(0.5, 1.3)) if factor == "noise" else (lambda: float(factor))
    pools = overload(PREFILL_BOUND, error=error)
    assert attainment(pools) >= 0.95
    assert len(pools.admitted_at_s) >= PREFILL_BOUND[2] * DURATION_S


def test_load_below_capacity_is_let_through():
    pools = overload(DECODE_BOUND, factor=0.8)
    assert len(pools.refused) <= 0.02 * len(pools.ended)
    assert attainment(pools) >= 0.97


def test_one_who_comes_back_when_told_gets_in():
    """A burst of two hundred; each comes again at its Retry-After."""
    rng, numbers = random.Random(1), itertools.count()
    pools = TwoPools(new_lane())
    coming: list[tuple[float, int, Job]] = []
    tries: dict[Ticket, int] = {}

    def send(at_s: float, num_tries: int) -> None:
        job = new_job(at_s, max(16, int(rng.gauss(1000, 200))), rng.randrange(2, 128))
        tries[job.ticket] = num_tries
        heapq.heappush(coming, (at_s, next(numbers), job))

    for at_s in poisson(10, 10, rng):
        send(at_s, 0)
    for i in range(200):
        send(12 + i * 1e-4, 0)
    num_seen = 0
    while coming or pools.lane.num_admitted:
        pools.run([], until_s=pools.now_s + 0.004)
        while coming and coming[0][0] <= pools.now_s:
            pools.arrive(heapq.heappop(coming)[2])
        for at_s, ticket in pools.refused[num_seen:]:
            send(at_s + ticket.retry_after_s, tries[ticket] + 1)
        num_seen = len(pools.refused)
        assert pools.now_s < 90, "retries do not come to an end"
    num_tries = Counter(tries[job.ticket] for job in pools.ended)
    came_back = sum(count for n, count in num_tries.items() if n)
    assert came_back >= 150
    assert num_tries[1] >= 0.85 * came_back
    assert max(tries.values()) <= 8


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_heavy_tenant_gets_its_share_and_no_more_through_both_pools(weight):
    """Both wait all the time, without targets; `heavy` sends ten times as much."""
    rng = random.Random(7)
    lane = Lane(AdmissionConfig(), max_ahead_s=0.3, worker_wait_s=1.0)
    pools = TwoPools(lane, token_s=0.0005, itl_sequence_s=0.0005)
    arrivals = []
    for tenant, rate, mean_prompt, mean_output in (
        ("heavy", 100.0, 1000, 200),
        ("light", 10.0, 500, 50),
    ):
        for at_s in poisson(rate, 60, rng):
            job = random_job(
                at_s, mean_prompt, mean_output, rng, tenant=tenant,
                weight=weight if tenant == "light" else 1.0,
            )  # fmt: skip
            job.ticket.targets, job.ticket.due_at_s = SloTargets(), at_s + 600
            arrivals.append((at_s, job))
    arrivals.sort(key=lambda a: a[0])
    pools.run(arrivals, until_s=60)
    served = dict.fromkeys(("heavy", "light"), 0.0)
    for job in pools.ended:
        ticket = job.ticket
        if job.ended_at_s is not None and job.ended_at_s > 10:
            served[ticket.tenant] += lane.cost.tokens(
                ticket.num_prompt_tokens, ticket.num_prompt_tokens, job.num_output
            )
    assert lane.queue.num_waiting("heavy") and lane.queue.num_waiting("light")
    assert served["light"] / served["heavy"] == pytest.approx(weight, rel=0.08)
