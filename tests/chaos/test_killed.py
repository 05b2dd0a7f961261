"""Workers are killed while KV moves between them; others of their pool take over."""

from __future__ import annotations

import pytest

from baton.core.worker_info import Role
from certificates import make_certificates, tls_files

pytestmark = pytest.mark.chaos
ASKS = {"prompt_tokens": 600, "max_tokens": 30}
NUM_ROUNDS = 3


@pytest.mark.parametrize("transport", ["shm", "nixl", "socket"])
@pytest.mark.parametrize("victim", [Role.DECODE, Role.PREFILL], ids=["reader", "owner"])
async def test_killed_mid_read(start_cluster, traffic_to, transport, victim) -> None:
    cluster = await start_cluster(2, 2, transport=transport)
    traffic = traffic_to(cluster, seed=1)
    for number in range(NUM_ROUNDS):
        name = f"{victim.value}-{number % 2}"
        asks = traffic.asks(6, **ASKS)
        sent = traffic.send(asks)
        await traffic.until_moving("prefill-0" if victim is Role.DECODE else name)
        cluster.kill(name)
        await traffic.finish(asks, sent)
        await cluster.calm()
        cluster.restart(name)
        await cluster.ready()
    await traffic.run(traffic.asks(4, **ASKS))
    await cluster.calm()


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"], ids=["reader", "owner"])
async def test_killed_mid_read_under_tls(start_cluster, traffic_to, tmp_path, victim) -> None:
    tls = tls_files(make_certificates(tmp_path / "tls"))
    cluster = await start_cluster(2, 2, transport="socket", tls=tls)
    traffic = traffic_to(cluster, seed=1)
    for _ in range(2):
        asks = traffic.asks(6, **ASKS)
        sent = traffic.send(asks)
        await traffic.until_moving("prefill-0")
        cluster.kill(victim)
        await traffic.finish(asks, sent)
        await cluster.calm()
        cluster.restart(victim)
        await cluster.ready()


@pytest.mark.parametrize("transport", ["shm", "nixl", "socket"])
async def test_owner_restarted_under_its_name(start_cluster, traffic_to, transport) -> None:
    """The only prefill worker comes back while its reader still has links to its last life."""
    cluster = await start_cluster(1, 1, transport=transport)
    traffic = traffic_to(cluster, seed=2)
    for _ in range(NUM_ROUNDS):
        asks = traffic.asks(4, **ASKS)
        sent = traffic.send(asks)
        await traffic.until_moving("prefill-0")
        cluster.kill("prefill-0")
        cluster.restart("prefill-0")
        # Requests wait for a prefill worker, or are computed where they are generated.
        await traffic.finish(asks, sent, may_fail=True)
        await cluster.ready()
        await traffic.run(traffic.asks(2, **ASKS))
        await cluster.calm()
