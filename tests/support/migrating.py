"""Requests that move between the scripted workers of tests/services/router: steps and looks."""

from __future__ import annotations

import asyncio


async def with_steps(cluster, step_s):
    for worker in cluster.workers.values():
        worker.step_s = step_s
    return cluster


def other(cluster, worker):
    return cluster["d1" if worker is cluster["d0"] else "d0"]


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not (found := condition()):
            await asyncio.sleep(0.002)
        return found


async def running(cluster, prompt, max_tokens=60, *, at=3, **kw):
    """(task, D1, D2) of a request that has produced `at` tokens on D1."""
    task = asyncio.create_task(cluster.generate(prompt, max_tokens, **kw))
    decodes = [cluster["d0"], cluster["d1"]]
    (d1,) = await until(lambda: [w for w in decodes if any(v.has_spoken for v in w.live.values())])
    await until(lambda: all(live.index >= at for live in d1.live.values()))
    return task, d1, other(cluster, d1)


async def done(task, timeout_s=8.0):
    async with asyncio.timeout(timeout_s):
        return await task


def works(worker):
    return [r.work for r in worker.submitted]


async def clean(cluster):
    """Nothing of any request or move is left."""
    await cluster.settled()
    await until(lambda: not cluster.core.migrator.num_under_way)
    assert not any(live.is_frozen for w in cluster.workers.values() for live in w.live.values())


def outcomes(cluster):
    """(reason, result) -> count, where there was any."""
    found = {}
    for line in cluster.core.metrics.render().decode().splitlines():
        if line.startswith("baton_migrations_total{"):
            labels, value = line.removeprefix("baton_migrations_total{").split("} ")
            pairs = dict(pair.replace('"', "").split("=") for pair in labels.split(","))
            if float(value):
                found[pairs["reason"], pairs["result"]] = float(value)
    return found
