"""The network between two workers loses everything for a while, then comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from baton.core.worker_info import Role
from network_namespace import NetworkNamespace, obstacle

pytestmark = pytest.mark.chaos
ASKS = {"prompt_tokens": 600, "max_tokens": 30}


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    namespace = NetworkNamespace()
    namespace.create()
    yield namespace
    namespace.remove()


@pytest.mark.parametrize("cut_s", [2.0, 20.0], ids=["short", "longer than keep-alives and leases"])
@pytest.mark.parametrize("far", [Role.DECODE, Role.PREFILL], ids=["reader", "owner"])
async def test_cut_and_healed(start_cluster, traffic_to, namespace, far, cut_s) -> None:
    """One worker lives behind the link; the router and the others are on our side of it."""
    cluster = await start_cluster(0, 0, transport="socket", router=("health.required_roles=",))
    near = f"host={namespace.outside_address}"
    for role in Role:
        cluster.add(role, near)
    inside = f"host={namespace.inside_address}"
    name = cluster.add(far, inside, prefix=namespace.prefix)
    await cluster.ready()
    traffic = traffic_to(cluster, seed=7)
    await traffic.run(traffic.asks(4, **ASKS))
    asks = traffic.asks(6, **ASKS)
    sent = traffic.send(asks)
    await traffic.until_moving(name if far is Role.PREFILL else "prefill-0")
    namespace.cut()
    await asyncio.sleep(cut_s / 2)
    others = traffic.asks(2, **ASKS)
    sent_others = traffic.send(others)
    await asyncio.sleep(cut_s / 2)
    namespace.heal()
    await traffic.finish(asks, sent)
    await traffic.finish(others, sent_others)
    await cluster.ready()
    await cluster.calm()
    before = (await cluster.info(name)).kv_sequence
    await traffic.run(traffic.asks(8, **ASKS))
    await cluster.calm()
    assert (await cluster.info(name)).kv_sequence > before, "the far worker got no work again"
