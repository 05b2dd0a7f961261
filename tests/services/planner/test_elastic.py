"""Pools that follow a scaler: nothing aborted, nothing leaked, every second paid for."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest

from baton.core.worker_info import Role, WorkerId
from baton.simulator.arrivals import RequestLengths, sampled
from baton.simulator.cluster import SimCluster
from baton.simulator.workload import Arrival
from made_up_worker import MODEL
from services.planner.actuator import PlannedWorker
from services.planner.autoscale import Autoscaler, Decision, Observation, PoolDecision
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.candidate import Candidate, Layout, Pool, cluster_of
from services.planner.elastic import ElasticRun
from services.planner.forecast import Forecast
from services.planner.objective import Objective
from services.planner.orders import Order, OrderKind, orders
from services.planner.pilots import Following, Ongoing, by_count
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo import SloTargets

CONFIG = cluster_of(
    Candidate(Pool(MODEL, 1), Pool(MODEL, 1), 2048), Layout(64, 800_000, 1024), seed=0
)
OBJECTIVE = Objective(0.4, 0.04)
ANY = PoolLimits(min_workers=0, max_workers=4)


def work(num: int = 150, seed: int = 0) -> list[Arrival]:
    pairs = [RequestLengths(512, 16), RequestLengths(64, 40), RequestLengths(300, 1)]
    return sampled(pairs, rate_per_s=5, num_requests=num, block_size=64, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_abort_nothing_and_leak_nothing(seed: int) -> None:
    rng = random.Random(seed)

    def anything(seen: Observation, ongoing: Ongoing) -> tuple[int, int]:
        assert ongoing.num_prefill >= 0
        assert ongoing.num_decode >= 0
        return rng.randint(1, 4), rng.randint(1, 4)

    elastic = ElasticRun(CONFIG, by_count(anything), OBJECTIVE, start_s=3.0, interval_s=2.0)
    arrivals = work(seed=seed)
    outcomes = elastic.run(arrivals)
    assert [o.num_output_tokens for o in outcomes] == [a.num_output_tokens for a in arrivals]
    assert max(s.num_prefill for s in elastic.samples) > 1
    assert elastic.device_s > 0


def test_a_worker_is_paid_from_its_start_to_its_end() -> None:
    def two_then_one(seen: Observation, ongoing: Ongoing) -> tuple[int, int]:
        return (2, 1) if 2 <= seen.now_s < 12 else (1, 1)

    elastic = ElasticRun(CONFIG, by_count(two_then_one), OBJECTIVE, start_s=3.0, interval_s=2.0)
    arrivals = work(150)
    outcomes = elastic.run(arrivals)
    end_s = max(o.last_token_s for o in outcomes)
    extra_s = elastic.device_s - 2 * end_s
    # From the decision at 2 s to the drain at 12 s, and until it was seen to be empty.
    assert 10.0 <= extra_s <= 10.0 + 2 * 2.0
    assert {o.prefill for o in outcomes} > {"p0"}


def test_a_worker_given_up_before_it_was_ready_never_joins() -> None:
    def changes_its_mind(seen: Observation, ongoing: Ongoing) -> tuple[int, int]:
        return (3 if seen.now_s < 5 else 1), 1

    elastic = ElasticRun(
        CONFIG, by_count(changes_its_mind), OBJECTIVE, start_s=60.0, interval_s=2.0
    )
    outcomes = elastic.run(work())
    assert {o.prefill for o in outcomes if o.kind == "remote_prefill"} <= {"p0"}


def test_what_is_observed_is_what_happened() -> None:
    seen: list[Observation] = []

    def watch(observation: Observation, ongoing: Ongoing) -> tuple[int, int]:
        seen.append(observation)
        return 1, 1

    arrivals = work(200)
    ElasticRun(CONFIG, by_count(watch), OBJECTIVE, start_s=3.0, interval_s=5.0).run(arrivals)
    told = sum(round(o.load.rate_per_s * 5.0) for o in seen)
    assert told == sum(a.at_s <= seen[-1].now_s for a in arrivals)
    judged = [o for o in seen if o.ttft_attainment is not None]
    assert sum(o.num_requests for o in judged) >= told / 2
    assert all(0 <= o.ttft_attainment <= 1 for o in judged if o.ttft_attainment is not None)
    assert all(o.prefill.num_ready == 1 for o in seen)


@pytest.mark.parametrize("seed", range(3))
def test_random_orders_with_changes_of_role_abort_nothing_and_leak_nothing(seed: int) -> None:
    rng = random.Random(seed)
    config = AutoscaleConfig(0.4, 0.04, max_devices=6, prefill=ANY, decode=ANY)
    unsure = PoolDecision(0, 0, 0, 0, 1.0, "drawn")

    def pilot(
        seen: Observation, ongoing: Ongoing, workers: Sequence[PlannedWorker]
    ) -> Sequence[Order]:
        assert len(workers) <= 6
        prefill, decode = (dataclasses.replace(unsure, desired=rng.randint(0, 3)) for _ in range(2))
        forecast = Forecast(0.0, 0.0, 0.0, 1.0, 0.0)
        drawn = Decision(seen.now_s, prefill, decode, rng.randint(-2, 2), forecast, False)
        return orders(drawn, workers, config)

    elastic = ElasticRun(CONFIG, pilot, OBJECTIVE, start_s=3.0, interval_s=2.0)
    arrivals = work(100, seed=seed)
    outcomes = elastic.run(arrivals)
    assert [o.num_output_tokens for o in outcomes] == [a.num_output_tokens for a in arrivals]
    kinds = {done.order.kind for done in elastic.orders}
    assert kinds == {OrderKind.START, OrderKind.DRAIN, OrderKind.CHANGE_ROLE}


def test_empty_pools_wake_with_the_first_request_and_serve_it() -> None:
    config = AutoscaleConfig(
        0.4, 0.04, max_devices=4, prefill=ANY, decode=ANY, window_s=10, forecast_s=5
    )
    model = dataclasses.replace(MODEL, start_s=6.0)
    arrivals = [
        dataclasses.replace(arrival, number=i, at_s=at_s)
        for i, (arrival, at_s) in enumerate(zip(work(6), (1, 120, 121, 122, 400, 401), strict=True))
    ]
    pilot = Following(Autoscaler(config, model, model), config)
    elastic = ElasticRun(CONFIG, pilot, OBJECTIVE, start_s=6.0, interval_s=2.0)
    outcomes = elastic.run(arrivals)
    sizes = {s.now_s: (s.num_prefill, s.num_decode) for s in elastic.samples}
    assert sizes[110.0] == (0, 0)
    # Seen within an interval, ready a start later.
    assert 6.0 <= outcomes[1].ttft_s <= 2.0 + 6.0 + 1.0
    assert 6.0 <= outcomes[4].ttft_s <= 2.0 + 6.0 + 1.0
    assert all(o.num_output_tokens for o in outcomes)


def test_with_admission_empty_pools_refuse_and_still_wake() -> None:
    config = AutoscaleConfig(0.4, 0.04, max_devices=4, prefill=ANY, decode=ANY, window_s=20)
    model = dataclasses.replace(MODEL, start_s=6.0)
    times = (1.0, 200.0, 212.0)
    arrivals = [
        dataclasses.replace(a, number=i, at_s=at_s, targets=SloTargets(0.4, 0.04))
        for i, (a, at_s) in enumerate(zip(work(3), times, strict=True))
    ]
    cluster = dataclasses.replace(CONFIG, admission=AdmissionConfig())
    pilot = Following(Autoscaler(config, model, model), config)
    outcomes = ElasticRun(cluster, pilot, OBJECTIVE, start_s=6.0, interval_s=2.0).run(arrivals)
    assert [o.refused_s is not None for o in outcomes] == [False, True, False]


def test_workers_come_and_go_by_name() -> None:
    cluster = SimCluster(CONFIG)
    with pytest.raises(ValueError, match="p0 was there before"):
        cluster.add_worker("p0", Role.PREFILL)
    cluster.add_worker("p7", Role.PREFILL)
    cluster.drain_worker(WorkerId("p0"))
    outcomes = cluster.run(work(20))
    assert {o.prefill for o in outcomes if o.kind == "remote_prefill"} <= {"p7"}
    cluster.remove_worker(WorkerId("p0"))
