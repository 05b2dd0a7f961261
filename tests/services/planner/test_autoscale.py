"""The autoscaler as a state machine: bounds, pace, corrections, a day with two bursts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from made_up_worker import MODEL
from services.planner.autoscale import (
    Autoscaler,
    Decision,
    Observation,
    PoolDecision,
    PoolState,
)
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.demand import Load
from tests.services.planner.test_demand import LOAD

LIMITS = PoolLimits(min_workers=1, max_workers=12)
CONFIG = AutoscaleConfig(
    ttft_s=0.4, itl_s=0.04, max_devices=24, prefill=LIMITS, decode=LIMITS, window_s=300
)


class Cluster:
    """Gives the autoscaler what it asks for, `start_s` later; shrinks at once."""

    def __init__(self, config: AutoscaleConfig = CONFIG, *, start_s: float = 30.0) -> None:
        self.scaler = Autoscaler(config, MODEL, MODEL)
        self.start_s, self.now_s = start_s, 0.0
        self.ready = {"prefill": 1, "decode": 1}
        self.coming: dict[str, list[float]] = {"prefill": [], "decode": []}
        self.joined = dict.fromkeys(self.ready, -math.inf)

    def tick(
        self,
        rate: float,
        *,
        ttft: float | None = 1.0,
        itl: float | None = 1.0,
        kv_usage: float = 0.1,
        load: Load = LOAD,
        gap_s: float = 10.0,
    ) -> Decision:
        self.now_s += gap_s
        for name, times in self.coming.items():
            arrived = [t for t in times if t <= self.now_s]
            if arrived:
                self.joined[name] = self.now_s
            self.ready[name] += len(arrived)
            self.coming[name] = [t for t in times if t > self.now_s]
        seen = Observation(
            self.now_s, dataclasses.replace(load, rate_per_s=rate), int(rate * gap_s), ttft, itl,
            self.state("prefill"), dataclasses.replace(self.state("decode"), kv_usage=kv_usage),
        )  # fmt: skip
        decision = self.scaler.decide(seen)
        self.follow("prefill", decision.prefill.desired)
        self.follow("decode", decision.decode.desired)
        return decision

    def state(self, name: str) -> PoolState:
        return PoolState(self.ready[name], len(self.coming[name]), last_joined_s=self.joined[name])

    def follow(self, name: str, desired: int) -> None:
        have = self.ready[name] + len(self.coming[name])
        self.coming[name] += [self.now_s + self.start_s] * max(0, desired - have)
        if desired < have:
            fewer = have - desired
            del self.coming[name][:fewer]
            self.ready[name] = min(self.ready[name], desired)


def reversals(values: list[int]) -> int:
    """Changes of direction."""
    moves = [b - a for a, b in itertools.pairwise(values) if b != a]
    return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(moves))


def test_a_step_is_followed_at_once_and_given_back_after_the_window() -> None:
    cluster = Cluster()
    for _ in range(60):
        quiet = cluster.tick(2)
    up = cluster.tick(40)
    assert up.prefill.desired > quiet.prefill.desired
    assert up.decode.desired > quiet.decode.desired
    assert "needed now" in up.prefill.reason or "by the time" in up.prefill.reason
    for _ in range(30):
        high = cluster.tick(40)
    falling = [cluster.tick(2).prefill.desired for _ in range(29)]
    assert min(falling) >= high.prefill.needed_now
    assert all(
        reversals([a, b, c]) == 0
        for a, b, c in zip(falling, falling[1:], falling[2:], strict=False)
    )
    assert "within the window" in cluster.tick(2).prefill.reason
    for _ in range(60):
        end = cluster.tick(2)
    assert end.prefill.desired == quiet.prefill.desired
    assert end.decode.desired == quiet.decode.desired


def test_a_day_with_two_bursts_turns_once_in_each() -> None:
    cluster = Cluster(dataclasses.replace(CONFIG, window_s=900))
    decided: list[tuple[int, int]] = []
    rng = random.Random(4)
    for i in range(1440):
        at = i / 1440
        rate = 12 - 8 * math.cos(2 * math.pi * at)
        if 0.30 < at < 0.34 or 0.70 < at < 0.74:
            rate *= 4
        decision = cluster.tick(rng.gauss(rate, 0.05 * rate), gap_s=60)
        decided.append((decision.prefill.desired, decision.decode.desired))
    for pool in (0, 1):
        values = [pair[pool] for pair in decided]
        assert max(values[430:500]) > 2 * values[425]
        for start, end in ((432, 525), (1008, 1102)):
            assert reversals(values[start:end]) <= 1


def test_misses_that_were_not_planned_for_raise_a_margin_that_fades() -> None:
    cluster = Cluster()
    for _ in range(40):
        before = cluster.tick(20)
    for _ in range(8):
        missed = cluster.tick(20, ttft=0.5)
    assert missed.prefill.margin > before.prefill.margin == 1.0
    assert missed.prefill.desired > before.prefill.desired
    assert missed.decode.margin == 1.0
    for _ in range(1000):
        after = cluster.tick(20)
    assert after.prefill.margin == pytest.approx(1.0, abs=1e-3)
    assert after.prefill.desired == before.prefill.desired


def test_cold_workers_small_samples_and_missing_workers_correct_nothing() -> None:
    cluster = Cluster()
    for _ in range(10):
        cluster.tick(1.0, ttft=0.0)
    assert cluster.tick(1.0, ttft=0.0).prefill.margin == 1.0
    cluster = Cluster(start_s=35)
    cluster.tick(40, ttft=0.0)
    for _ in range(5):
        # They start, and then they are cold.
        decision = cluster.tick(40, ttft=0.0)
    assert decision.prefill.margin == 1.0


def test_pools_go_to_nothing_and_come_back_with_the_first_request() -> None:
    none = PoolLimits(min_workers=0, max_workers=12)
    config = dataclasses.replace(CONFIG, prefill=none, decode=none, window_s=10)
    cluster = Cluster(config, start_s=30)
    for _ in range(30):
        decision = cluster.tick(0.0)
    assert (decision.prefill.desired, decision.decode.desired) == (0, 0)
    woken = cluster.tick(0.1)
    assert (woken.prefill.desired, woken.decode.desired) == (1, 1)
    # A window shorter than a start: those that start still come to see what they started for.
    while not cluster.ready["prefill"]:
        assert cluster.tick(0.0).prefill.desired == 1
        assert cluster.now_s < 1000
    assert cluster.ready["decode"] == 1


def test_a_queue_asks_for_workers_until_it_is_gone() -> None:
    scaler = Autoscaler(CONFIG, MODEL, MODEL)
    load = dataclasses.replace(LOAD, rate_per_s=4)

    def decided(now_s: float, num_waiting: float) -> Decision:
        prefill = PoolState(2, num_waiting=num_waiting)
        return scaler.decide(Observation(now_s, load, 40, None, None, prefill, PoolState(2)))

    calm = decided(0, 1).prefill.needed_now
    queued = decided(10, 300).prefill.needed_now
    assert queued > calm
    assert decided(20, 1).prefill.needed_now == calm


def test_noise_at_a_low_rate_is_not_planned_for() -> None:
    """Two arrivals an interval: now and then there are six."""
    # At 1.1 requests/s a prefill worker is busy half its time, at 2 it is too few.
    load = Load(0.0, 3000, 4.5e6, 60, 3030)
    cluster, rng = Cluster(dataclasses.replace(CONFIG, ttft_s=2.0)), random.Random(5)
    desired: list[int] = []
    for _ in range(1500):
        at_s, num = rng.expovariate(1.0), 0
        while at_s < 2.0:
            num, at_s = num + 1, at_s + rng.expovariate(1.0)
        decision = cluster.tick(num / 2, ttft=None, itl=None, load=load, gap_s=2.0)
        desired.append(decision.prefill.desired)
    # Planned interval by interval, it would be three nearly all the time.
    assert sum(num > 2 for num in desired) < len(desired) / 3
    assert reversals(desired) <= 4


def test_nobody_shrinks_at_once_when_nobody_has_looked_for_a_window() -> None:
    before = Cluster()
    for _ in range(10):
        before.tick(1.0)
    again = Cluster()
    again.scaler.restore(before.scaler.state())
    again.now_s = before.now_s + 86_400
    again.ready = {"prefill": 3, "decode": 4}
    for _ in range(int(CONFIG.window_s / 10)):
        decision = again.tick(0.1)
        assert (decision.prefill.desired, decision.decode.desired) == (3, 4)
    for _ in range(5):
        decision = again.tick(0.1)
    assert (decision.prefill.desired, decision.decode.desired) == (1, 1)


def test_full_memory_grows_the_decode_pool() -> None:
    cluster = Cluster()
    for _ in range(40):
        cluster.tick(4)
    ready = cluster.ready["decode"]
    assert cluster.tick(4, kv_usage=0.95).decode.desired == ready + 1


def test_devices_are_shared_out_when_they_do_not_suffice() -> None:
    config = dataclasses.replace(CONFIG, max_devices=6)
    cluster = Cluster(config)
    for _ in range(20):
        decision = cluster.tick(100)
    assert decision.is_at_budget
    assert decision.prefill.desired + decision.decode.desired == 6
    assert min(decision.prefill.desired, decision.decode.desired) >= 1
    assert "6 devices allow" in decision.prefill.reason + decision.decode.reason


@pytest.mark.parametrize("can_change_roles", [False, True])
def test_at_the_budget_what_is_only_kept_gives_way_to_what_is_needed(
    can_change_roles: bool,
) -> None:
    config = dataclasses.replace(CONFIG, max_devices=8, can_change_roles=can_change_roles)
    cluster = Cluster(config)
    long_answers = dataclasses.replace(LOAD, uncached_tokens=16, pairs=128, output_tokens=600)
    long_prompts = dataclasses.replace(LOAD, uncached_tokens=2000, pairs=2e6, output_tokens=2)
    for _ in range(40):
        cluster.tick(7, load=long_answers)
    had = cluster.ready["decode"]
    assert had == 7
    decision = cluster.tick(7, load=long_prompts)
    assert decision.prefill.needed_now > 1 and decision.decode.needed_now < had
    assert decision.prefill.desired == min(8 - 1, decision.prefill.needed_now)
    assert decision.decode.desired < had
    assert "within the window" in decision.decode.reason or "go over" in decision.decode.reason
    assert (decision.num_role_changes < 0) == can_change_roles


def test_devices_that_do_not_suffice_are_shared_in_proportion() -> None:
    # One of two is less than two of three.
    config = dataclasses.replace(CONFIG, max_devices=4)
    scaler = Autoscaler(config, MODEL, MODEL)
    planned = {
        Role.PREFILL: PoolDecision(2, 2, 1, 1, 1.0, ""),
        Role.DECODE: PoolDecision(3, 3, 2, 3, 1.0, ""),
    }
    fitted, is_at_budget = scaler._fit(planned)
    assert is_at_budget
    assert [fitted[role].desired for role in (Role.PREFILL, Role.DECODE)] == [2, 2]


def test_a_pool_with_too_many_lends_to_one_with_too_few() -> None:
    config = dataclasses.replace(CONFIG, can_change_roles=True)
    cluster = Cluster(config)
    long_prompts = dataclasses.replace(LOAD, uncached_tokens=2000, pairs=2e6, output_tokens=2)
    long_answers = dataclasses.replace(LOAD, uncached_tokens=16, pairs=128, output_tokens=600)
    for _ in range(40):
        cluster.tick(8, load=long_prompts)
    had = cluster.ready["prefill"]
    decision = cluster.tick(8, load=long_answers)
    assert 0 < decision.num_role_changes < had
    assert decision.prefill.desired == had - decision.num_role_changes
    assert "go over to decode" in decision.prefill.reason
    assert cluster.tick(8, load=long_answers).prefill.desired <= had - decision.num_role_changes
    # Those that have refused stay, so the other pool starts workers of its own.
    settled = Observation(
        0.0, dataclasses.replace(long_answers, rate_per_s=8), 80, 1.0, 1.0,
        PoolState(8, num_settled=8), PoolState(1),
    )  # fmt: skip
    refused = Autoscaler(config, MODEL, MODEL).decide(settled)
    assert refused.num_role_changes == 0 and refused.decode.desired > 1
    unlike = Autoscaler(config, MODEL, dataclasses.replace(MODEL, tensor_parallel=2))
    many, few = PoolState(8), PoolState(1)
    load = dataclasses.replace(long_answers, rate_per_s=8)
    seen = Observation(0.0, load, 80, 1.0, 1.0, many, few)
    assert unlike.decide(seen).num_role_changes == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_walks_stay_within_all_bounds_and_say_why(seed: int) -> None:
    rng = random.Random(seed)
    config = AutoscaleConfig(
        ttft_s=rng.choice([0.1, 0.4, 3]),
        itl_s=rng.choice([0.021, 0.04, 0.2]),
        max_devices=rng.choice([5, 12, 40]),
        prefill=PoolLimits(rng.randrange(2), 10, rng.choice([1, 2])),
        decode=PoolLimits(1, rng.choice([3, 10]), 1),
        window_s=rng.choice([30, 300]),
        can_change_roles=rng.random() < 0.5,
    )
    cluster = Cluster(config, start_s=rng.choice([5, 60]))
    for _ in range(400):
        rate = rng.choice([0.0, 1.0, 10.0, 80.0, 1000.0]) * rng.random()
        decision = cluster.tick(
            rate,
            ttft=rng.choice([None, 0.0, 0.95, 1.0]),
            itl=rng.choice([None, 0.5, 1.0]),
            kv_usage=rng.random(),
            gap_s=rng.choice([0.0, 1.0, 10.0, 120.0]),
        )
        pairs = ((decision.prefill, config.prefill), (decision.decode, config.decode))
        for pool, limits in pairs:
            assert limits.min_workers <= pool.desired <= limits.max_workers
            assert 1.0 <= pool.margin <= 4.0
            assert pool.reason
        used = sum(pool.desired * limits.devices_per_worker for pool, limits in pairs)
        assert used <= config.max_devices
        assert (
            not decision.is_at_budget
            or used + max(limits.devices_per_worker for _, limits in pairs) > config.max_devices
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ttft_s": 0}, "autoscale.ttft_s must be above 0"),
        ({"share": 1}, "autoscale.share"),
        ({"headroom": 0.5}, "autoscale.headroom must be from 1 to 10, got 0.5"),
        ({"burst_share": 2}, "autoscale.burst_share"),
        ({"max_devices": 1}, "max_devices is 1, but one prefill and one decode worker need 2"),
        ({"max_devices": 0}, "max_devices is 0, but one prefill and one decode worker need 2"),
        (
            {"max_devices": 8, "prefill": PoolLimits(8, 12)},
            "max_devices is 8, but min_workers of both pools need 9",
        ),
    ],
)
def test_bad_settings_are_refused(change: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="min_workers 3 must be from 0 to max_workers 2"):
        PoolLimits(3, 2)
    with pytest.raises(ConfigError, match="max_workers must be at least 1, got 0"):
        PoolLimits(0, 0)
