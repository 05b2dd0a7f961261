"""A running system as a planner sees it over HTTP, before and after requests."""

from __future__ import annotations

import time

import httpx

from baton.core.worker_info import Role
from observed import NUM_TOKENS, PROMPT
from services.planner.http_stats import HttpStats, StatsConfig
from services.planner.observer import Observer
from services.router.pool_stats import PoolStats


def test_a_planner_sees_what_was_asked_and_what_it_took(observed):
    source = HttpStats(StatsConfig((observed.system.url,)))
    place = observed.system.url.removeprefix("http://")
    observer = Observer()

    def look() -> PoolStats:
        reading = source.read()
        assert reading.failed == {}
        return reading.copies[place]

    before = look()
    assert before.prefill.num_ready == before.decode.num_ready == 1
    assert observer.observe(time.time(), {place: before}) is None
    num = 6
    for seed in range(num):
        observed.complete({"seed": seed, "prompt": [240 + seed, *PROMPT[1:]]})
    deadline_s = time.monotonic() + 20
    while (after := look()).prefill_steps.num - before.prefill_steps.num < num:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    added = after.since(before)
    assert (added.num_arrived, added.num_prompts, added.num_ended) == (num, num, num)
    assert added.num_refused == 0
    assert added.uncached_tokens == num * len(PROMPT)
    assert added.pairs == num * len(PROMPT) ** 2 / 2
    assert added.output_tokens == num * NUM_TOKENS
    assert added.prefill_steps.tokens == num * len(PROMPT)
    assert 0 < added.prefill_steps.engine_s < added.uptime_s
    assert added.decode_steps.num == num
    assert added.decode_steps.batch >= num
    # One request at a time: its steps take no longer than it did.
    assert 0 < added.decode_steps.step_s * (NUM_TOKENS - 1) < added.uptime_s
    # Nobody said what requests without targets are judged by.
    assert added.ttft_measured == 0
    assert after.num_running == 0
    seen = observer.observe(time.time(), {place: after})
    assert seen is not None
    assert seen.observation.load.uncached_tokens == len(PROMPT)
    assert seen.observation.load.output_tokens == NUM_TOKENS
    # Gauges of workers follow once a second.
    deadline_s = time.monotonic() + 20
    while (busy_s := _prefill_busy_s(observed)) * 1.01 < after.prefill_steps.engine_s:
        assert time.monotonic() < deadline_s, (busy_s, after.prefill_steps)
        time.sleep(0.2)


def _prefill_busy_s(observed):
    role = Role.PREFILL.value
    return observed.scrape().total("baton_worker_busy_seconds_total", role=role)


def test_requests_with_targets_are_judged_by_them(observed):
    url = f"{observed.system.url}/pool_stats"
    before = PoolStats.from_numbers(httpx.get(url, trust_env=False).json())
    observed.complete(x_slo_ttft_ms="60000", x_slo_itl_ms="60000")
    observed.complete(x_slo_ttft_ms="60000")
    after = PoolStats.from_numbers(httpx.get(url, trust_env=False).json()).since(before)
    assert (after.ttft_measured, after.ttft_met) == (2, 2)
    assert (after.itl_measured, after.itl_met) == (1, 1)
    assert httpx.post(url, trust_env=False).status_code == 405
