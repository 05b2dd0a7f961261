"""Workers stand still for longer than a lease, and go on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from baton.core.worker_info import Role
from baton.rpc.channel import KEEPALIVE_S

pytestmark = pytest.mark.chaos
ASKS = {"prompt_tokens": 600, "max_tokens": 30}
LEASE_S = 3.0
PAUSE_S = 2 * LEASE_S


@pytest.mark.parametrize("transport", ["shm", "nixl", "socket"])
@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE], ids=["owner", "reader"])
async def test_paused_past_its_lease(start_cluster, traffic_to, transport, victim) -> None:
    cluster = await start_cluster(2, 2, f"transfer.lease_s={LEASE_S}", transport=transport)
    traffic = traffic_to(cluster, seed=3)
    name = f"{victim.value}-0"
    asks = traffic.asks(6, **ASKS)
    sent = traffic.send(asks)
    await traffic.until_moving("prefill-0")
    cluster.pause(name)
    # Fills the pools of the others over and over: blocks of expired leases are written anew.
    await asyncio.sleep(0.5)
    others = traffic.asks(6, **ASKS)
    sent_others = traffic.send(others)
    await asyncio.sleep(PAUSE_S)
    cluster.resume(name)
    await traffic.finish(asks, sent)
    await traffic.finish(others, sent_others)
    await cluster.calm()
    await cluster.ready()
    await traffic.run(traffic.asks(4, **ASKS))
    await cluster.calm()


async def test_the_clock_alone_takes_a_silent_readers_lease(start_cluster, traffic_to) -> None:
    """Its stream stands, and nobody is left who could cancel: the router is stopped as well."""
    lease_s = 1.0
    cluster = await start_cluster(1, 1, f"transfer.lease_s={lease_s}")
    traffic = traffic_to(cluster, seed=4)
    asks = traffic.asks(6, **ASKS)
    sent = traffic.send(asks)
    await traffic.until_moving("prefill-0")
    os.kill(cluster.router_pid, signal.SIGSTOP)
    cluster.pause("decode-0")
    paused_s = time.monotonic()
    try:
        # Long before anybody takes the silence for a lost connection.
        while (load := (await cluster.info("prefill-0")).load).leases or load.num_running:
            assert time.monotonic() - paused_s < KEEPALIVE_S - 2, f"{load}\n{cluster.logs()}"
            await asyncio.sleep(0.1)
    finally:
        cluster.resume("decode-0")
        os.kill(cluster.router_pid, signal.SIGCONT)
    await traffic.finish(asks, sent)
    await cluster.calm()
