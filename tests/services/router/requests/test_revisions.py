"""Two revisions of a model under one name, as during a roll-out: no prompt and no answer crosses
from one to the other."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest

from baton.core.errors import NoWorker
from baton.core.request import Work

PROMPT = list(range(1, 101))


def old_and_new(cluster) -> None:
    """Workers whose number is even serve the old revision, the others the new one."""
    for name, worker in cluster.workers.items():
        revision = "old" if int(name[1:]) % 2 == 0 else "new"
        worker.layout = dataclasses.replace(worker.layout, model_id=revision)


async def again(cluster) -> None:
    """Workers say anew who they are."""
    for worker in cluster.workers.values():
        await worker.kill()
    for worker in cluster.workers.values():
        await worker.revive()
    await cluster.connected()


@pytest.fixture
async def two(make_cluster) -> AsyncIterator:
    """Two workers of each pool, one of each revision."""
    cluster = await make_cluster(2, 2)
    old_and_new(cluster)
    await again(cluster)
    yield cluster
    await cluster.settled()


async def begun(cluster, worker: str, num_tokens: int, max_tokens: int = 30):
    """A request that has got so many tokens, on the revision of `worker`."""
    others = [w for w in cluster.workers.values() if w.layout != cluster[worker].layout]
    for other in others:
        other.set_load(is_draining=True)
    await drains(cluster, others)
    tokens: list[int] = []

    async def read() -> list[int]:
        async for delta in cluster.stream(cluster.input(PROMPT, max_tokens)):
            tokens.extend(delta.token_ids)
        return tokens

    cluster[worker].step_s = 0.01
    task = asyncio.create_task(read())
    while len(tokens) < num_tokens:
        assert not task.done()
        await asyncio.sleep(0.002)
    for other in others:
        other.set_load(is_draining=False)
    return task


async def drains(cluster, workers) -> None:
    wanted = {worker.worker_id for worker in workers}
    while {w.info.worker_id for w in cluster.core.pool.view().workers if w.is_ending} != wanted:
        await asyncio.sleep(0.005)


async def test_an_answer_goes_on_with_the_revision_that_began_it(two) -> None:
    task = await begun(two, "d0", 5)
    await two["d0"].kill()
    tokens = await asyncio.wait_for(task, 10)
    assert tokens == [ord("a") + (sum(PROMPT) + k) % 26 for k in range(30)]
    # The new revision has a prefill and a decode worker at hand, the old one a prefill worker.
    assert two["p0"].submitted[-1].work is Work.GENERATE
    assert not two["p1"].submitted and not two["d1"].submitted


async def test_an_answer_whose_revision_is_gone_ends_with_the_reason(make_cluster) -> None:
    cluster = await make_cluster(0, 2)
    old_and_new(cluster)
    await again(cluster)
    task = await begun(cluster, "d0", 5)
    await cluster["d0"].kill()
    with pytest.raises(NoWorker, match="revision old of the model, which began this answer"):
        await asyncio.wait_for(task, 10)
    assert not cluster["d1"].submitted
    await cluster.settled()


async def test_a_request_without_tokens_may_go_to_the_other_revision(two) -> None:
    for name in ("p0", "d0"):
        two[name].faults.kill_on_submit = True
    for _ in range(8):
        outcome = await asyncio.wait_for(two.generate(PROMPT, 5), 10)
        two.assert_right(outcome, PROMPT, 5)


async def test_revisions_are_never_paired(make_cluster) -> None:
    """Workers drain, die and come back at random under load."""
    cluster = await make_cluster(4, 4)
    old_and_new(cluster)
    await again(cluster)
    rng = random.Random(36)
    names = sorted(cluster.workers)
    asked = [asyncio.create_task(cluster.ended(PROMPT, 12)) for _ in range(10)]
    for _ in range(40):
        worker = cluster[rng.choice(names)]
        match rng.randrange(4):
            case 0 if worker.is_alive and sum(w.is_alive for w in cluster.workers.values()) > 4:
                await worker.kill()
            case 1 if not worker.is_alive:
                await worker.revive()
            case _ if worker.is_alive:
                worker.set_load(is_draining=rng.random() < 0.3)
        prompt = [rng.randrange(1, 200) for _ in range(rng.randrange(20, 120))]
        asked += [asyncio.create_task(cluster.ended(prompt, 12)) for _ in range(3)]
        await asyncio.sleep(0.01)
    ends = await asyncio.wait_for(asyncio.gather(*asked), 60)
    assert ends.count("right") > len(ends) // 2
    num_pairs = 0
    for worker in cluster.workers.values():
        for request in worker.submitted:
            if request.kv_source is not None:
                num_pairs += 1
                assert cluster.kv.workers[request.kv_source.worker_id].layout == worker.layout
    assert num_pairs > 20
    await cluster.settled()
