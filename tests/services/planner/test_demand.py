"""Workers that a load needs, against known values and against the simulator."""

from __future__ import annotations

import dataclasses

import pytest

from baton.simulator.arrivals import RequestLengths, sampled
from baton.simulator.cluster import SimCluster
from made_up_worker import MODEL
from services.planner.candidate import Candidate, Layout, Pool, cluster_of
from services.planner.demand import (
    Load,
    decode_workers,
    erlang_c,
    prefill_s,
    prefill_workers,
    ttft_miss_share,
)
from services.planner.objective import Objective, attainment
from services.planner.search import NO_LOCAL_PREFILL

LOAD = Load(20.0, 512, 512 * 256, 32, 528)


@pytest.mark.parametrize(
    ("servers", "offered", "probability"),
    [(1, 0.3, 0.3), (1, 0.9, 0.9), (2, 1.0, 1 / 3), (3, 2.0, 4 / 9), (10, 0.0, 0.0)],
)
def test_erlang_c_has_its_known_values(servers: int, offered: float, probability: float) -> None:
    assert erlang_c(servers, offered) == pytest.approx(probability)


def test_more_load_never_needs_fewer_workers_and_more_workers_never_miss_more() -> None:
    before = (0, 0)
    for rate in [0.0, 0.1, 1, 3, 10, 30, 100, 300, 1000]:
        load = dataclasses.replace(LOAD, rate_per_s=rate)
        now = (
            prefill_workers(MODEL, load, ttft_s=0.4, share=0.9),
            decode_workers(MODEL, load, itl_s=0.04),
        )
        assert now[0] >= before[0]
        assert now[1] >= before[1]
        before = now
    misses = [ttft_miss_share(MODEL, LOAD, num, 0.4) for num in range(1, 20)]
    assert misses == sorted(misses, reverse=True)


def test_nothing_needs_nobody_and_a_target_out_of_reach_needs_a_queue_that_ends() -> None:
    nothing = dataclasses.replace(LOAD, rate_per_s=0)
    assert prefill_workers(MODEL, nothing, ttft_s=0.4, share=0.9) == 0
    assert decode_workers(MODEL, nothing, itl_s=0.04) == 0
    num = prefill_workers(MODEL, LOAD, ttft_s=0.01, share=0.9)
    assert num - 1 <= LOAD.rate_per_s * prefill_s(MODEL, LOAD) < num


def test_memory_bounds_a_batch_that_pace_would_allow() -> None:
    small = dataclasses.replace(MODEL, max_kv_tokens=3000)
    assert decode_workers(small, LOAD, itl_s=1.0) > decode_workers(MODEL, LOAD, itl_s=1.0)


@pytest.mark.parametrize("rate", [12.0, 35.0])
def test_workers_of_the_formula_keep_the_targets_when_simulated(rate: float) -> None:
    load = dataclasses.replace(LOAD, rate_per_s=rate)
    num_prefill = prefill_workers(MODEL, load, ttft_s=0.4, share=0.9)
    num_decode = decode_workers(MODEL, load, itl_s=0.04)

    def kept(prefill: int, decode: int) -> float:
        candidate = Candidate(Pool(MODEL, prefill), Pool(MODEL, decode), 2048)
        config = cluster_of(candidate, Layout(64, 800_000, 1024), 0, NO_LOCAL_PREFILL)
        arrivals = sampled(
            [RequestLengths(512, 32)], rate_per_s=rate, num_requests=300, block_size=64, seed=5
        )
        reached = attainment(SimCluster(config).run(arrivals), Objective(0.4, 0.04))
        return min(reached.ttft, reached.itl)

    assert kept(num_prefill, num_decode + 1) >= 0.9
    # Half of them are clearly too few, so the formula is not merely generous.
    assert kept(max(1, num_prefill // 2), num_decode + 1) < 0.9
