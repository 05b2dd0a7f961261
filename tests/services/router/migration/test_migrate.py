"""Requests that move between workers while they run: the client sees every token once, whatever
happens to either worker, and nothing is left anywhere."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import random

import pytest

from baton.core.logging import JsonFormatter
from baton.core.request import FinishReason, Work
from migrating import clean, done, other, outcomes, running, until, with_steps, works

LONG = list(range(1, 101))
SHORT = [5, 6, 7]
PHASES = ("reading", "frozen", "complete")


@pytest.fixture
async def two(make_cluster):
    """One prefill worker, two decode workers with slow steps."""
    return await with_steps(await make_cluster(1, 2), 0.01)


# Success.


@pytest.mark.parametrize("prompt", [LONG, SHORT])
async def test_draining_worker_hands_its_request_on(two, prompt, caplog):
    task, d1, d2 = await running(two, prompt)
    with caplog.at_level(logging.INFO):
        d1.set_load(is_draining=True)
        outcome = await done(task)
    two.assert_right(outcome, prompt, 60)
    await clean(two)
    (takeover,) = d2.submitted
    first = d1.submitted[0]
    assert takeover.work is Work.TAKEOVER
    assert takeover.kv_source.worker_id == d1.worker_id
    assert takeover.request_id == first.request_id
    assert takeover.block_hashes == first.block_hashes
    assert list(takeover.output_token_ids) == outcome.token_ids[: len(takeover.output_token_ids)]
    assert 0 < takeover.deadline_s <= first.deadline_s
    assert not d1.cancelled and not d2.cancelled
    assert outcomes(two) == {("drain", "moved"): 1.0}
    _check_log(caplog, d1, d2)


def _check_log(caplog, d1, d2):
    lines = [json.loads(JsonFormatter("router").format(r)) for r in caplog.records]
    (ended,) = [line for line in lines if line["message"] == "request ended"]
    (move,) = ended["migrations"]
    assert (move["source"], move["target"]) == (d1.worker_id, d2.worker_id)
    assert move["state"] == "moved" and move["pause_seconds"] >= 0
    assert move["transfer_bytes"] == 4096
    # The hand-off's own transfer is not overwritten by that of the move, nor decoding cut short.
    assert ended["request_decode_seconds"] == 1.0
    (moved,) = [line for line in lines if line["message"] == "takeover moved"]
    assert moved["reason"] == "the worker is ending"


async def test_pause_of_a_move_is_measured(two):
    task, d1, _ = await running(two, LONG)
    d1.set_load(is_draining=True)
    await done(task)
    assert 'baton_migration_pause_seconds_count{model="fake"} 1.0' in await two.rendered()


async def test_worker_that_leaves_the_membership_hands_its_requests_on(two):
    task, d1, d2 = await running(two, LONG)
    everyone = {w.worker_id: w.address for w in two.workers.values()}
    two.membership.update({k: v for k, v in everyone.items() if k != d1.worker_id})
    two.assert_right(await done(task), LONG, 60)
    assert works(d2) == [Work.TAKEOVER]
    await until(lambda: len(two.core.pool._sessions) == 2)


async def test_request_of_a_prefill_worker_moves_as_well(make_cluster):
    cluster = await with_steps(await make_cluster(1, 1), 0.01)
    await cluster["d0"].kill()
    await cluster.connected("p0")
    task = asyncio.create_task(cluster.generate(LONG, 60))
    await until(lambda: any(live.has_spoken for live in cluster["p0"].live.values()))
    await cluster["d0"].revive()
    await cluster.connected()
    cluster["p0"].set_load(is_draining=True)
    cluster.assert_right(await done(task), LONG, 60)
    assert works(cluster["d0"]) == [Work.TAKEOVER]


async def test_last_decode_worker_hands_on_to_the_prefill_pool(cluster):
    await with_steps(cluster, 0.01)
    task = asyncio.create_task(cluster.generate(LONG, 60))
    await until(lambda: any(live.index > 4 for live in cluster["d0"].live.values()))
    cluster["d0"].set_load(is_draining=True)
    cluster.assert_right(await done(task), LONG, 60)
    assert works(cluster["p0"]) == [Work.PREFILL, Work.TAKEOVER]
    await clean(cluster)


async def test_drain_moves_everything(make_cluster):
    cluster = await with_steps(await make_cluster(1, 3), 0.01)
    prompts = [[n + 1, *LONG] for n in range(12)]
    tasks = [asyncio.create_task(cluster.generate(p, 150)) for p in prompts]
    decodes = [cluster[f"d{n}"] for n in range(3)]
    await until(
        lambda: sum(live.has_spoken for w in decodes for live in w.live.values()) == len(prompts)
    )
    leaving = max(decodes, key=lambda w: len(w.live))
    num_live = len(leaving.live)
    leaving.set_load(is_draining=True)
    await until(lambda: not leaving.live)
    assert sum(works(w).count(Work.TAKEOVER) for w in decodes) == num_live
    assert not all(task.done() for task in tasks)
    for task, prompt in zip(tasks, prompts, strict=True):
        cluster.assert_right(await done(task), prompt, 150)
    assert outcomes(cluster) == {("drain", "moved"): num_live}
    await clean(cluster)


async def test_moves_at_a_time_are_bounded(make_cluster, config):
    migration = dataclasses.replace(config.migration, max_concurrent=2)
    config = dataclasses.replace(config, migration=migration)
    cluster = await with_steps(await make_cluster(0, 2, config=config), 0.01)
    cluster["d1"].set_load(is_draining=True)
    await until(lambda: len(cluster.core.pool.view().eligible(model="fake")) == 1)
    tasks = [asyncio.create_task(cluster.generate([n, *LONG], 100)) for n in range(6)]
    await until(lambda: sum(v.has_spoken for v in cluster["d0"].live.values()) == 6)
    cluster["d1"].faults.takeover_stays_in = "reading"
    cluster["d1"].set_load(is_draining=False)
    await until(lambda: len(cluster.core.pool.view().eligible(model="fake")) == 2)
    cluster["d0"].set_load(is_draining=True)
    await until(lambda: len(cluster["d1"].live) == 2)
    await asyncio.sleep(0.2)
    assert len(cluster["d1"].live) == 2 and cluster.core.migrator.num_under_way == 2
    cluster["d1"].faults.takeover_stays_in = ""
    for n, task in enumerate(tasks):
        cluster.assert_right(await done(task), [n, *LONG], 100)
    assert outcomes(cluster) == {("drain", "moved"): 6.0}


async def test_rolling_restart_moves_a_request_again_and_again(make_cluster):
    cluster = await with_steps(await make_cluster(0, 2), 0.01)
    task, d1, d2 = await running(cluster, LONG, max_tokens=200)
    for n in range(4):
        d1.set_load(is_draining=True)
        await until(
            lambda d1=d1, d2=d2: not d1.live and any(v.has_spoken for v in d2.live.values())
        )
        if n == 1:
            await d1.kill()
            await d1.revive()
        d1.set_load(is_draining=False)
        await cluster.connected()
        d1, d2 = d2, d1
    cluster.assert_right(await done(task), LONG, 200)
    assert outcomes(cluster) == {("drain", "moved"): 4.0}
    await clean(cluster)


async def test_old_workers_late_tokens_come_before_the_new_ones(two):
    task, d1, d2 = await running(two, LONG, max_tokens=100)
    d1.faults.write_delay_s = 0.03
    await asyncio.sleep(0.1)
    d1.set_load(is_draining=True)
    await until(lambda: d2.live, timeout_s=8)
    two.assert_right(await done(task), LONG, 100)
    assert sum(len(w.submitted) for w in (d1, d2)) == 2
    await clean(two)


async def test_slow_client_does_not_hold_a_move_up(two):
    stream = two.stream(two.input(LONG, 240))
    for _ in range(4):
        first = await anext(stream)
    assert first.token_ids
    d1 = next(w for w in (two["d0"], two["d1"]) if w.live)
    # The client reads nothing before, while and well after the request moves.
    await until(lambda: all(live.index > 100 for live in d1.live.values()))
    d1.set_load(is_draining=True)
    await until(lambda: other(two, d1).live)
    await until(lambda: not two.core.migrator.num_under_way)
    await asyncio.sleep(1.2)
    rest = [d async for d in stream]
    assert rest[-1].usage.completion_tokens == 240
    assert outcomes(two) == {("drain", "moved"): 1.0}
    await clean(two)


async def test_sampling_seed_logprobs_and_stop_go_along(two):
    seed = 11
    text = bytes(ord("a") + (sum(LONG) + seed + k) % 26 for k in range(60)).decode()
    task, d1, d2 = await running(
        two, LONG, 200, stop=(text[40:60],), seed=seed, temperature=1.0, logprobs=0
    )
    d1.set_load(is_draining=True)
    outcome = await done(task)
    assert d2.submitted[0].sampling == d1.submitted[0].sampling
    assert outcome.finish_reason is FinishReason.STOP
    assert [e.logprob for e in outcome.logprobs] == [
        -float(k) for k in range(len(outcome.logprobs))
    ]


# Memory pressure.


async def test_worker_under_pressure_loses_requests_until_it_has_room_again(make_cluster):
    cluster = await with_steps(await make_cluster(0, 2), 0.01)
    cluster["d1"].set_load(is_draining=True)
    await until(lambda: len(cluster.core.pool.view().eligible(model="fake")) == 1)
    prompts = [[n + 1] * (800 + n) for n in range(4)]
    tasks = [asyncio.create_task(cluster.generate(p, 300)) for p in prompts]
    d0, d1 = cluster["d0"], cluster["d1"]
    await until(lambda: sum(v.has_spoken for v in d0.live.values()) == 4)
    d1.set_load(is_draining=False)
    await until(lambda: len(cluster.core.pool.view().eligible(model="fake")) == 2)
    # 4 % are available; each request holds some 5 %: two of them bring it to the high watermark,
    # and after the first the load report shows half of it.
    d0.set_load(free_blocks=40)
    await until(lambda: len(d1.submitted) == 3)
    d0.set_load(free_blocks=200)
    await asyncio.sleep(0.3)
    assert len(d1.submitted) == 3
    assert [len(r.prompt_token_ids) for r in d1.submitted] == [803, 802, 801]
    for task, prompt in zip(tasks, prompts, strict=True):
        cluster.assert_right(await done(task), prompt, 300)
    assert outcomes(cluster) == {("pressure", "moved"): 3.0}
    await clean(cluster)


async def test_pressure_everywhere_moves_nothing(two):
    task, d1, d2 = await running(two, LONG)
    for worker in (d1, d2):
        worker.set_load(free_blocks=10)
    two.assert_right(await done(task), LONG, 60)
    assert not outcomes(two) and not d2.submitted


# Everything at once.


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_walk_over_moves_with_faults(make_cluster, seed):
    """Workers drain, come under pressure, fail takeovers, die; requests end and are cancelled."""
    rng = random.Random(seed)
    cluster = await with_steps(await make_cluster(1, 3), 0.005)
    decodes = [cluster[f"d{n}"] for n in range(3)]
    slots = asyncio.Semaphore(12)
    counts = {"right": 0, "cancelled": 0, "error": 0}

    async def one():
        prompt = [rng.randrange(1, 100) for _ in range(rng.choice((3, 40, 100, 300)))]
        max_tokens = rng.choice((2, 30, 100, 150))
        cancel_after_s = rng.choice((None, None, None, rng.uniform(0, 0.3)))
        async with slots:
            counts[await cluster.ended(prompt, max_tokens, cancel_after_s=cancel_after_s)] += 1

    async def trouble():
        while True:
            worker = rng.choice(decodes)
            what = rng.choice(("drain", "drain", "pressure", "fail", "stay", "kill", "delay"))
            if what == "drain":
                worker.set_load(is_draining=True)
            elif what == "pressure":
                worker.set_load(free_blocks=rng.choice((10, 40)))
            elif what == "fail":
                worker.faults.takeover_fails_in = rng.choice(PHASES)
            elif what == "stay":
                worker.faults.takeover_stays_in = rng.choice(PHASES)
            elif what == "delay":
                worker.faults.write_delay_s = 0.01
            elif worker.is_alive:
                await worker.kill()
                await asyncio.sleep(rng.uniform(0.02, 0.1))
                await worker.revive()
            await asyncio.sleep(rng.uniform(0.05, 0.3))
            worker.faults.takeover_fails_in = worker.faults.takeover_stays_in = ""
            worker.faults.write_delay_s = 0.0
            worker.set_load(is_draining=False, free_blocks=1000)

    troublemaker = asyncio.create_task(trouble())
    async with asyncio.timeout(60):
        await asyncio.gather(*(one() for _ in range(120)))
    troublemaker.cancel()
    await asyncio.gather(troublemaker, return_exceptions=True)
    await clean(cluster)
    assert sum(counts.values()) == 120 and counts["right"] > 60, counts
    found = outcomes(cluster)
    assert sum(n for (_, outcome), n in found.items() if outcome == "moved") >= 5, found
    for session in cluster.core.pool._sessions.values():
        assert not session._requests
    assert "baton_requests_running 0.0" in cluster.core.metrics.render().decode()
