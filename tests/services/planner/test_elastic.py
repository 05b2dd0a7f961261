"""Pools that follow a scaler: nothing aborted, nothing leaked, every second paid for."""

from __future__ import annotations

import random

import pytest

from baton.core.worker_info import Role, WorkerId
from baton.simulator.arrivals import RequestLengths, sampled
from baton.simulator.cluster import SimCluster
from baton.simulator.workload import Arrival
from made_up_worker import MODEL
from services.planner.autoscale import Observation
from services.planner.candidate import Candidate, Layout, Pool, cluster_of
from services.planner.elastic import ElasticRun, Ongoing
from services.planner.objective import Objective

CONFIG = cluster_of(
    Candidate(Pool(MODEL, 1), Pool(MODEL, 1), 2048), Layout(64, 800_000, 1024), seed=0
)
OBJECTIVE = Objective(0.4, 0.04)


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

    elastic = ElasticRun(CONFIG, anything, OBJECTIVE, start_s=3.0, interval_s=2.0)
    arrivals = work(seed=seed)
    outcomes = elastic.run(arrivals)
    assert [o.num_output_tokens for o in outcomes] == [a.num_output_tokens for a in arrivals]
    assert max(s.num_prefill for s in elastic.samples) > 1
    assert elastic.device_s > 0


def test_a_worker_is_paid_from_its_start_to_its_end() -> None:
    def two_then_one(seen: Observation, ongoing: Ongoing) -> tuple[int, int]:
        return (2, 1) if 2 <= seen.now_s < 12 else (1, 1)

    elastic = ElasticRun(CONFIG, two_then_one, OBJECTIVE, start_s=3.0, interval_s=2.0)
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

    elastic = ElasticRun(CONFIG, changes_its_mind, OBJECTIVE, start_s=60.0, interval_s=2.0)
    outcomes = elastic.run(work())
    assert {o.prefill for o in outcomes if o.kind == "remote_prefill"} <= {"p0"}


def test_what_is_observed_is_what_happened() -> None:
    seen: list[Observation] = []

    def watch(observation: Observation, ongoing: Ongoing) -> tuple[int, int]:
        seen.append(observation)
        return 1, 1

    arrivals = work(200)
    ElasticRun(CONFIG, watch, OBJECTIVE, start_s=3.0, interval_s=5.0).run(arrivals)
    told = sum(round(o.load.rate_per_s * 5.0) for o in seen)
    assert told == sum(a.at_s <= seen[-1].now_s for a in arrivals)
    ended = sum(o.num_requests for o in seen)
    assert told - 30 <= ended <= told
    assert all(o.prefill.num_ready == 1 for o in seen)


def test_workers_come_and_go_by_name() -> None:
    cluster = SimCluster(CONFIG)
    with pytest.raises(ValueError, match="p0 was there before"):
        cluster.add_worker("p0", Role.PREFILL)
    cluster.add_worker("p7", Role.PREFILL)
    cluster.drain_worker(WorkerId("p0"))
    outcomes = cluster.run(work(20))
    assert {o.prefill for o in outcomes if o.kind == "remote_prefill"} <= {"p7"}
    cluster.remove_worker(WorkerId("p0"))
