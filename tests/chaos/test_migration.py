"""Running sequences move between decode workers while things happen to either of them."""

from __future__ import annotations

import asyncio

import pytest

pytestmark = pytest.mark.chaos
ASKS = {"prompt_tokens": 200, "max_tokens": 200}
DRAIN_S = 20.0
SETTINGS = (f"drain_s={DRAIN_S:g}", "transfer.lease_s=5")


async def begun(cluster, traffic, number):
    """Streams with some tokens each, on both decode workers."""
    asks = traffic.asks(number, **ASKS)
    begun = [asyncio.Event() for _ in asks]
    sent = [
        asyncio.create_task(
            cluster.generate(a.prompt, a.max_tokens, started=b, num_tokens_before_start=5)
        )
        for a, b in zip(asks, begun, strict=True)
    ]
    async with asyncio.timeout(30):
        await asyncio.gather(*(event.wait() for event in begun))
    return asks, sent


async def restart(cluster, traffic, name):
    cluster.restart(name)
    await cluster.ready()
    await traffic.run(traffic.asks(2, prompt_tokens=300, max_tokens=30))
    await cluster.calm()


@pytest.mark.parametrize("transport", ["shm", "nixl", "socket"])
async def test_worker_that_leaves_hands_its_streams_on(start_cluster, traffic_to, transport):
    cluster = await start_cluster(1, 2, *SETTINGS, transport=transport)
    traffic = traffic_to(cluster, seed=8)
    asks, sent = await begun(cluster, traffic, 4)
    cluster.leave("decode-0")
    answers = await traffic.finish(asks, sent)
    assert await cluster.ended("decode-0", DRAIN_S) == 0
    assert await cluster.total("baton_migrations_total") > 0
    print("longest pauses:", [round(answer.longest_pause_s, 3) for answer in answers])
    await cluster.calm()
    await restart(cluster, traffic, "decode-0")


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"], ids=["source", "target"])
@pytest.mark.parametrize("after_s", [0.1, 0.3, 0.6])
async def test_killed_while_streams_move(start_cluster, traffic_to, victim, after_s):
    cluster = await start_cluster(1, 3, *SETTINGS)
    traffic = traffic_to(cluster, seed=9)
    asks, sent = await begun(cluster, traffic, 6)
    cluster.leave("decode-0")
    await asyncio.sleep(after_s)
    cluster.kill(victim)
    await traffic.finish(asks, sent)
    await cluster.calm(timeout_s=DRAIN_S if victim == "decode-1" else 10.0)


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"], ids=["source", "target"])
async def test_paused_while_streams_move(start_cluster, traffic_to, victim):
    cluster = await start_cluster(1, 3, *SETTINGS)
    traffic = traffic_to(cluster, seed=10)
    asks, sent = await begun(cluster, traffic, 6)
    cluster.leave("decode-0")
    await asyncio.sleep(0.3)
    cluster.pause(victim)
    await asyncio.sleep(8)
    cluster.resume(victim)
    await traffic.finish(asks, sent)
    assert await cluster.ended("decode-0", DRAIN_S + 10) == 0
    await cluster.calm()


async def test_clients_leave_while_streams_move(start_cluster, traffic_to):
    cluster = await start_cluster(1, 2, *SETTINGS)
    traffic = traffic_to(cluster, seed=11)
    staying, sent = await begun(cluster, traffic, 2)
    leaving = traffic.asks(6, **ASKS)
    left = [
        asyncio.create_task(
            cluster.generate(a.prompt, a.max_tokens, cancel_after_s=traffic.rng.uniform(0.5, 3))
        )
        for a in leaving
    ]
    await asyncio.sleep(0.6)
    cluster.leave("decode-0")
    await traffic.finish(leaving, left, may_fail=True)
    await traffic.finish(staying, sent)
    assert await cluster.ended("decode-0", DRAIN_S + 10) == 0
    await cluster.calm()
