"""Workers that change their pools, as a router sees them: requests go by the new role at once, and
what was sent for the old one is placed anew without a failure."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from baton.core.kv_layout import KvLayout
from baton.core.request import Work
from baton.core.worker_info import Epoch, Role
from baton.rpc.convert import worker_info_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from services.router.requests.breaker import BreakerState
from services.router.requests.retry_config import RetryConfig

LONG = list(range(1, 101))
CHANGES = 'baton_router_role_changes_total{role="prefill"}'


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def refused_retries(cluster):
    text = await cluster.rendered()
    found = [
        line for line in text.splitlines() if line.startswith("baton_router_retries_refused_total ")
    ]
    return sum(float(line.split()[-1]) for line in found)


def roles(cluster):
    return {w.info.worker_id: w.info.role for w in cluster.core.pool.view().workers}


@pytest.fixture
async def cluster(make_cluster, config):
    """One worker to prefill, two to decode, and no retry to spend on failures."""
    retry = RetryConfig(budget_ratio=0.0, budget_reserve=1)
    return await make_cluster(1, 2, config=dataclasses.replace(config, retry=retry))


async def test_requests_go_by_the_new_role_at_once(cluster):
    cluster["d0"].change_role()
    await until(lambda: roles(cluster)["d0"] is Role.PREFILL)
    await cluster["p0"].kill()
    await until(lambda: len(cluster.core.pool.view().eligible(model="fake")) == 2)
    cluster.assert_right(await cluster.generate(LONG, 10), LONG, 10)
    assert [r.work for r in cluster["d0"].submitted] == [Work.PREFILL]
    assert [r.work for r in cluster["d1"].submitted] == [Work.DECODE]
    text = await cluster.rendered(f"{CHANGES} 1.0", 'baton_workers{role="decode"} 1.0')
    assert 'baton_worker_requests_running{role="prefill",worker="d0"}' in text
    assert 'role="decode",worker="d0"' not in text
    cluster.core.pool.table.check_integrity()
    await cluster.settled()


async def test_what_is_cached_is_known_after_the_change(cluster):
    layout: KvLayout = cluster["d0"].layout
    await cluster.generate(LONG, 4)
    flight_hashes = cluster["p0"].submitted[0].block_hashes
    cluster["d0"].store(flight_hashes)
    await until(lambda: len(cluster.core.pool.index) >= len(flight_hashes))
    slot = cluster.core.pool.index.slot_of("d0")
    cluster["d0"].change_role()
    await until(lambda: roles(cluster)["d0"] is Role.PREFILL)
    assert cluster.core.pool.index.slot_of("d0") == slot
    assert len(cluster.core.pool.index) >= len(flight_hashes)
    assert layout == cluster.core.pool.table.get("d0").info.layout


async def test_work_for_the_old_role_is_placed_anew_and_nobody_has_failed(cluster):
    cluster["p0"].change_role(is_told=False)
    outcomes = await asyncio.gather(*(cluster.generate([*LONG, i], 6) for i in range(12)))
    for i, outcome in enumerate(outcomes):
        cluster.assert_right(outcome, [*LONG, i], 6)
    assert cluster["p0"].num_stale
    assert roles(cluster)["p0"] is Role.DECODE
    breakers = cluster.core.dispatcher._starter._failures._breakers
    assert breakers.state("p0") is BreakerState.CLOSED
    assert await refused_retries(cluster) == 0
    await cluster.settled()


@pytest.mark.parametrize("name", ["p0", "d0"])
async def test_all_that_a_worker_hands_back_at_once_goes_on_elsewhere(cluster, name):
    """More than the retry budget would allow."""
    for worker in cluster.workers.values():
        worker.step_s = 0.02
    cluster["d1"].set_load(is_draining=name == "d0")
    if name == "d0":
        await until(lambda: len(cluster.core.pool.view().eligible(model="fake")) == 2)
    prompts = [[*LONG, i] for i in range(12)]
    tasks = [asyncio.create_task(cluster.generate(prompt, 20)) for prompt in prompts]
    await until(lambda: cluster[name].live)
    cluster["d1"].set_load(is_draining=False)
    await until(lambda: len(cluster.core.pool.view().eligible(model="fake")) == 3)
    cluster[name].hand_back()
    for prompt, task in zip(prompts, tasks, strict=True):
        cluster.assert_right(await asyncio.wait_for(task, 10), prompt, 20)
    assert await refused_retries(cluster) == 0
    await cluster.settled()


async def test_a_request_that_everybody_hands_back_ends_with_an_error(cluster):
    """Bounded, whatever workers say."""
    for worker in cluster.workers.values():
        worker.role_version = 7
        worker.tell_role = lambda: None
    with pytest.raises(Exception, match=r"try again|too many others"):
        await cluster.generate(LONG, 4)
    assert sum(w.num_stale for w in cluster.workers.values()) <= 100
    await cluster.settled()


async def test_a_router_that_was_away_hears_of_the_change_with_the_welcome(cluster):
    worker = cluster["d0"]
    worker.faults.is_frozen = True
    await until(lambda: not cluster.core.pool.table.get("d0").is_eligible)
    worker.change_role(is_told=False)
    worker.faults.is_frozen = False
    await until(lambda: roles(cluster)["d0"] is Role.PREFILL)
    await cluster.rendered(f"{CHANGES} 1.0")
    cluster.assert_right(await cluster.generate(LONG, 4), LONG, 4)
    assert worker.num_stale == 0


async def test_a_worker_that_says_it_is_another_is_broken_off(cluster):
    worker = cluster["d0"]
    info = dataclasses.replace(worker.info, epoch=Epoch("other"), role=Role.PREFILL)
    worker.send_all(pb.WorkerMessage(info=worker_info_to_wire(info)))
    await until(lambda: not cluster.core.pool.table.get("d0").is_eligible)
    assert roles(cluster)["d0"] is Role.DECODE
    await cluster.connected()
