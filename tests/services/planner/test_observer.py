"""Observations from sums: rates, restarts, lost copies, lengths, attainment, workers."""

from __future__ import annotations

import dataclasses
import random

import pytest

from baton.core.worker_info import Role
from planned_world import OUTPUT_TOKENS, PROMPT_TOKENS, World
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.observer import Observer, Seen
from services.router.pool_stats import PoolMoment, PoolStats


def look(observer: Observer, world: World) -> Seen | None:
    return observer.observe(world.now_s, world.read().copies, world.workers())


def looked(observer: Observer, world: World) -> Seen:
    seen = look(observer, world)
    assert seen is not None
    return seen


def test_rates_are_summed_over_copies_and_lengths_are_means() -> None:
    world, observer = World(num_copies=3, rate_per_s=6.0), Observer()
    world.pass_time(1000)
    # What came before the first look is of another time.
    assert look(observer, world) is None
    world.pass_time(10)
    seen = looked(observer, world)
    load = seen.observation.load
    assert load.rate_per_s == pytest.approx(6.0)
    assert load.uncached_tokens == pytest.approx(PROMPT_TOKENS)
    assert load.pairs == pytest.approx(PROMPT_TOKENS**2 / 2)
    assert load.output_tokens == pytest.approx(OUTPUT_TOKENS)
    assert load.context_tokens == pytest.approx(PROMPT_TOKENS + OUTPUT_TOKENS / 2)
    assert seen.observation.num_requests == 60
    assert seen.num_copies == 3
    assert seen.prefill_steps.num == pytest.approx(60)


def test_a_copy_that_starts_again_counts_from_its_start() -> None:
    world, observer = World(num_copies=2, rate_per_s=4.0), Observer()
    world.pass_time(100)
    look(observer, world)
    world.pass_time(4)
    world.restart_copy("router-0")
    world.pass_time(6)
    assert looked(observer, world).observation.load.rate_per_s == pytest.approx(4.0)


def test_a_copy_that_starts_again_right_after_its_start_counts_once() -> None:
    world, observer = World(num_copies=1, rate_per_s=4.0), Observer()
    world.pass_time(3)
    look(observer, world)
    world.pass_time(4)
    world.restart_copy("router-0")
    # It has been there for longer now than when it was seen the first time.
    world.pass_time(6)
    seen = looked(observer, world)
    assert seen.observation.load.rate_per_s == pytest.approx(4.0)
    assert seen.prefill_steps.num == pytest.approx(24)


def test_a_copy_that_does_not_answer_is_left_out_and_joins_again() -> None:
    world, observer = World(num_copies=2, rate_per_s=4.0), Observer()
    world.pass_time(10)
    look(observer, world)
    world.silent = {"router-1"}
    world.pass_time(10)
    seen = looked(observer, world)
    assert (seen.observation.load.rate_per_s, seen.num_copies) == (pytest.approx(2.0), 1)
    world.silent = set()
    world.pass_time(10)
    assert looked(observer, world).observation.load.rate_per_s == pytest.approx(4.0)


def test_a_new_copy_counts_at_once_and_an_old_one_from_the_next_look_on() -> None:
    world, observer = World(num_copies=1, rate_per_s=4.0), Observer()
    world.pass_time(10)
    look(observer, world)
    world.pass_time(10)
    old = PoolStats(500.0, num_arrived=9000)
    young = PoolStats(5.0, num_arrived=15)
    copies = {**world.copies, "old": old, "young": young}
    seen = observer.observe(world.now_s, copies)
    assert seen is not None
    assert seen.observation.load.rate_per_s == pytest.approx(4.0 + 3.0)
    copies["old"] = dataclasses.replace(old, uptime_s=510.0, num_arrived=9010)
    seen = observer.observe(world.now_s + 10, {"old": copies["old"]})
    assert seen is not None and seen.observation.load.rate_per_s == pytest.approx(1.0)


def test_nobody_answering_is_no_observation() -> None:
    observer = Observer()
    assert observer.observe(0.0, {}) is None
    assert observer.observe(10.0, {"r": PoolStats(50.0)}) is None
    # The same reading twice says nothing either.
    assert observer.observe(20.0, {"r": PoolStats(50.0)}) is None


def test_attainment_waits_for_enough_requests_and_counts_each_once() -> None:
    world, observer = World(num_copies=1, rate_per_s=0.5, ttft_share=0.5), Observer()
    world.pass_time(10)
    look(observer, world)
    told = []
    for _ in range(12):
        world.pass_time(10)
        seen = looked(observer, world).observation
        told.append((seen.ttft_attainment, seen.num_requests))
    enough = [t for t in told if t[0] is not None]
    assert [t for t in told if t[0] is None] == [(None, 0)] * 9
    assert enough == [(pytest.approx(0.5), 20)] * 3


def test_few_requests_over_a_long_time_say_nothing() -> None:
    world, observer = World(num_copies=1, rate_per_s=0.05), Observer()
    world.pass_time(10)
    look(observer, world)
    for _ in range(100):
        world.pass_time(10)
        assert looked(observer, world).observation.ttft_attainment is None


def test_lengths_stay_known_without_traffic_and_follow_a_change() -> None:
    world, observer = World(num_copies=1, rate_per_s=5.0), Observer()
    look(observer, world)
    for _ in range(5):
        world.pass_time(10)
        look(observer, world)
    world.rate_per_s = 0.0
    for _ in range(50):
        world.pass_time(10)
        seen = looked(observer, world)
    assert seen.observation.load.rate_per_s == 0
    assert seen.observation.load.uncached_tokens == pytest.approx(PROMPT_TOKENS)


def test_workers_are_those_of_whoever_starts_them_else_those_that_routers_see() -> None:
    moment = PoolMoment(num_ready=3, num_draining=1, kv_usage=0.5, youngest_s=40.0)
    stats = PoolStats(10.0, num_arrived=10, prefill=moment, decode=moment)
    workers = [
        PlannedWorker("a", Role.DECODE, WorkerPhase.READY, 70.0),
        PlannedWorker("b", Role.DECODE, WorkerPhase.STARTING),
        PlannedWorker("c", Role.PREFILL, WorkerPhase.DRAINING, 3.0),
    ]
    for given in (None, workers):
        observer = Observer()
        observer.observe(100.0, {"r": PoolStats(0.0)}, given)
        seen = observer.observe(110.0, {"r": stats}, given)
        assert seen is not None
        prefill, decode = seen.observation.prefill, seen.observation.decode
        if given is None:
            assert (decode.num_ready, decode.num_draining, decode.last_joined_s) == (3, 1, 70.0)
        else:
            assert (decode.num_ready, decode.num_starting, decode.last_joined_s) == (1, 1, 70.0)
            assert (prefill.num_ready, prefill.num_draining) == (0, 1)
        assert decode.kv_usage == 0.5


def test_time_does_not_go_backwards() -> None:
    observer = Observer()
    observer.observe(10.0, {})
    with pytest.raises(ValueError, match="back to 9"):
        observer.observe(9.0, {})


def test_random_walk_of_copies_loses_and_invents_no_request() -> None:
    rng = random.Random(5)
    world, observer = World(num_copies=3, rate_per_s=10.0), Observer()
    world.pass_time(5)
    look(observer, world)
    counted = 0.0
    for _ in range(2000):
        world.rate_per_s = rng.choice([0.0, 1.0, 10.0, 40.0])
        gap_s = rng.uniform(0.1, 30)
        world.silent = {n for n in world.copies if rng.random() < 0.2}
        world.pass_time(gap_s)
        seen = look(observer, world)
        if len(world.silent) == len(world.copies):
            assert seen is None
            continue
        assert seen is not None
        load = seen.observation.load
        assert 0 <= load.rate_per_s <= 40.0 + 1e-9
        assert load.uncached_tokens >= 1 and load.context_tokens >= 1
        counted += seen.prefill_steps.num
    # What silent copies did is told when they answer again.
    world.silent = set()
    world.pass_time(1)
    counted += looked(observer, world).prefill_steps.num
    total = sum(s.prefill_steps.num for s in world.copies.values())
    assert counted == pytest.approx(total - 50, rel=1e-6)
