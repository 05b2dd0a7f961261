"""A worker of either pool leaves while it is full and others wait in its queue: nobody notices."""

from __future__ import annotations

import asyncio

import pytest

from baton.rpc.channel import open_channel
from baton.rpc.v1.worker_pb2 import DrainRequest
from baton.rpc.v1.worker_pb2_grpc import WorkerStub

pytestmark = pytest.mark.chaos
ASKS = {"prompt_tokens": 300, "max_tokens": 60}
SMALL = ("engine.max_num_seqs=2", "engine.kv_cache_bytes=40000000")


async def full(cluster, traffic, victim, number=24):
    """Requests of which `victim` has more than it can take at a time."""
    asks = traffic.asks(number, **ASKS)
    sent = traffic.send(asks)
    async with asyncio.timeout(30):
        while True:
            load = (await cluster.info(victim)).load
            if load.num_waiting and (load.num_running or load.leases or load.reservations):
                return asks, sent
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("drain_s", [1.0, 30.0])
@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
async def test_a_full_worker_leaves(start_cluster, traffic_to, victim, drain_s):
    cluster = await start_cluster(2, 2, *SMALL, f"drain_s={drain_s:g}")
    traffic = traffic_to(cluster, seed=31)
    asks, sent = await full(cluster, traffic, victim)
    cluster.leave(victim)
    await traffic.finish(asks, sent)
    assert await cluster.ended(victim, drain_s + 15) == 0
    await cluster.calm()


async def test_half_of_both_pools_leaves_at_once(start_cluster, traffic_to):
    cluster = await start_cluster(2, 2, *SMALL, "drain_s=2")
    traffic = traffic_to(cluster, seed=32)
    asks, sent = await full(cluster, traffic, "decode-1")
    for name in ("prefill-1", "decode-1"):
        cluster.leave(name)
    await traffic.finish(asks, sent)
    for name in ("prefill-1", "decode-1"):
        assert await cluster.ended(name, 20) == 0
    await cluster.calm()


@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
async def test_a_full_worker_is_drained_before_it_is_stopped(start_cluster, traffic_to, victim):
    """As `baton drain` and then its supervisor do."""
    cluster = await start_cluster(2, 2, *SMALL, "drain_s=2")
    traffic = traffic_to(cluster, seed=33)
    asks, sent = await full(cluster, traffic, victim)
    address = (await cluster.info(victim)).info.address
    async with open_channel(address) as channel:
        reply = await WorkerStub(channel).Drain(DrainRequest(timeout_ms=60_000))
    assert reply.num_ended == 0
    cluster.leave(victim)
    await traffic.finish(asks, sent)
    assert await cluster.ended(victim, 20) == 0
    await cluster.calm()
