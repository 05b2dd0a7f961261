"""What a router tells planners: sums that only grow, numbers that come back, who has joined."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Epoch, LoadReport, Role
from services.router.pool_stats import PoolMoment, PoolStats
from services.router.pool_stats_book import PoolStatsBook
from services.router.pool_stats_config import PoolStatsConfig
from services.router.workers.cluster_view import ClusterView, WorkerState
from worker_tables import worker_info


def book(**targets: float) -> PoolStatsBook:
    return PoolStatsBook(PoolStatsConfig(**targets), 100.0)


def read(book: PoolStatsBook, now_s: float = 110.0, *workers: WorkerState) -> PoolStats:
    return book.read(ClusterView(workers), now_s, num_running=3, num_queued=1)


def test_numbers_come_back_exactly_through_json() -> None:
    rng = random.Random(1)
    names = list(PoolStats(0.0).to_numbers())
    assert len(names) == len(set(names)) > 30
    for _ in range(50):
        numbers = {name: rng.choice([0.0, rng.random() * 1e9]) for name in names}
        stats = PoolStats.from_numbers(json.loads(json.dumps(numbers)))
        assert stats.to_numbers() == numbers


@pytest.mark.parametrize("value", [None, "3", True, math.nan, math.inf])
def test_what_is_no_number_is_refused_by_name(value: object) -> None:
    numbers: dict[str, object] = {**PoolStats(1.0).to_numbers(), "decode_kv_usage": value}
    with pytest.raises(ConfigError, match="decode_kv_usage must be"):
        PoolStats.from_numbers(numbers)  # type: ignore[arg-type]
    del numbers["decode_kv_usage"]
    with pytest.raises(ConfigError, match="decode_kv_usage must be a number, got None"):
        PoolStats.from_numbers(numbers)  # type: ignore[arg-type]


def test_differences_are_of_sums_and_moments_are_of_now() -> None:
    before = PoolStats(10.0, num_arrived=5, num_running=9, decode=PoolMoment(1))
    now = PoolStats(25.0, num_arrived=8, num_running=2, decode=PoolMoment(4))
    added = now.since(before)
    assert (added.uptime_s, added.num_arrived, added.num_running) == (15.0, 3, 2)
    assert added.decode.num_ready == 4
    assert before.since(now).num_arrived == 0
    assert added.plus(before).num_arrived == 8


def test_sums_are_what_happened() -> None:
    stats = book()
    for _ in range(3):
        stats.arrived()
    stats.refused()
    stats.prompt(100, 60)
    stats.prompt(10, 0)
    # More than the prompt is cached where a request goes on with what it had produced.
    stats.prompt(10, 12)
    stats.output(100, 20)
    stats.prefill_steps(40, 60, 0.5)
    stats.decode_steps(4, 2000, 0.02)
    told = read(stats)
    assert (told.uptime_s, told.num_arrived, told.num_refused) == (10.0, 3, 1)
    assert (told.num_prompts, told.uncached_tokens) == (3, 50)
    assert told.pairs == 40 * (60 + 20) + 10 * 5
    assert (told.num_ended, told.output_tokens, told.held_tokens) == (1, 20, 20 * 110)
    assert (told.prefill_steps.num, told.prefill_steps.tokens) == (1, 40)
    assert (told.prefill_steps.pairs, told.prefill_steps.engine_s) == (40 * 80, 0.5)
    assert dataclasses.astuple(told.decode_steps) == (1, 4, 2000, 0.02)
    assert (told.num_running, told.num_queued) == (3, 1)


def test_judgements_are_counted_by_target() -> None:
    stats = book(ttft_s=0.5)
    stats.judged(is_ttft_met=True, is_itl_met=None)
    stats.judged(is_ttft_met=False, is_itl_met=True)
    stats.judged(is_ttft_met=None, is_itl_met=None)
    told = read(stats)
    assert (told.ttft_measured, told.ttft_met) == (2, 1)
    assert (told.itl_measured, told.itl_met) == (1, 1)
    assert (told.num_judged, told.num_kept) == (2, 1)
    assert (told.ttft_target_s, told.itl_target_s) == (0.5, 0.0)


def worker(name: str, role: Role = Role.DECODE, **changes: object) -> WorkerState:
    load = LoadReport(total_blocks=100, free_blocks=40, num_waiting=2)
    state = WorkerState(dataclasses.replace(worker_info(name), role=role), load)
    return dataclasses.replace(state, **changes)  # type: ignore[arg-type]


def test_pools_are_told_with_the_age_of_the_youngest() -> None:
    stats = book()
    one, two = worker("d0"), worker("d1")
    # Who is there at the first look has been there.
    stats.look(ClusterView((one,)), 101.0)
    assert read(stats, 120.0, one).decode.youngest_s == 20.0
    stats.look(ClusterView((one, two)), 121.0)
    ending = dataclasses.replace(worker("d2"), is_leaving=True)
    broken = dataclasses.replace(worker("d3"), is_quarantined=True)
    told = read(stats, 125.0, one, two, ending, broken, worker("p0", Role.PREFILL))
    assert dataclasses.astuple(told.decode) == (2, 1, pytest.approx(0.6), 6, 4.0)
    assert told.prefill.num_ready == 1
    assert told.prefill.youngest_s == 0.0


def test_a_worker_that_starts_again_or_changes_its_role_is_a_young_one() -> None:
    stats = book()
    one = worker("d0")
    stats.look(ClusterView((one,)), 101.0)
    again = dataclasses.replace(one, info=dataclasses.replace(one.info, epoch=Epoch("new")))
    assert read(stats, 200.0, again).decode.youngest_s == 0.0
    changed = dataclasses.replace(again, info=dataclasses.replace(again.info, role=Role.PREFILL))
    assert read(stats, 300.0, changed).prefill.youngest_s == 0.0


def test_nothing_is_kept_of_workers_that_are_gone() -> None:
    stats = book()
    for i in range(200):
        stats.look(ClusterView((worker(f"d{i}"),)), 101.0 + i)
    assert len(stats._ready_at_s) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, 1e7])
def test_impossible_targets_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"pool_stats.itl_s must be seconds above 0"):
        PoolStatsConfig(itl_s=value)
