"""Workers go over to the other pool under load: no stream notices."""

from __future__ import annotations

import asyncio
import signal

import pytest

from baton.core.errors import DeadlineExceeded
from baton.core.worker_info import Role, WorkerId
from baton.rpc.role_change import change_role
from certificates import make_certificates, tls_files
from cluster import Cluster

ASKS = {"prompt_tokens": 200, "max_tokens": 150}
P, D = Role.PREFILL, Role.DECODE


async def change(cluster, name, role, timeout_s=30.0, **options):
    info = (await cluster.registry.list())[WorkerId(name)]
    return await change_role(info.address, role, cluster.tls, timeout_s, **options)


async def there_and_back(cluster, *changes):
    """Each of `changes` (name, new role), and all of them taken back; the processes stay."""
    for name, role in changes:
        before = (await cluster.info(name)).info
        after = await change(cluster, name, role)
        assert (after.role, after.role_version) == (role, before.role_version + 1)
        assert (after.epoch, after.pid) == (before.epoch, before.pid)
    for name, role in changes:
        assert (await change(cluster, name, role.other)).role is role.other


async def under_load(cluster, traffic, number, work):
    """`work` while so many streams run; all of them are right and whole."""
    asks = traffic.asks(number, **ASKS)
    sent = traffic.send(asks)
    await asyncio.sleep(0.5)
    await work
    await traffic.finish(asks, sent)
    assert await cluster.total("baton_router_retries_refused_total") == 0


async def test_workers_of_both_pools_go_over_and_back(start_cluster, traffic_to):
    cluster = await start_cluster(2, 2)
    traffic = traffic_to(cluster, seed=21)
    work = there_and_back(cluster, ("prefill-1", D), ("decode-0", P))
    await under_load(cluster, traffic, 12, work)
    assert await cluster.total("baton_router_role_changes_total") == 4
    await cluster.ready()
    await cluster.calm()


@pytest.mark.chaos
async def test_full_workers_go_over(start_cluster, traffic_to):
    """With places for two sequences and blocks for few, most requests wait somewhere."""
    small = ("engine.max_num_seqs=2", "engine.kv_cache_bytes=40000000")
    cluster = await start_cluster(2, 2, *small)
    traffic = traffic_to(cluster, seed=22)
    work = there_and_back(cluster, ("decode-0", P), ("prefill-1", D))
    await under_load(cluster, traffic, 24, work)
    await cluster.calm()


@pytest.mark.chaos
async def test_the_pools_swap_all_their_workers(start_cluster, traffic_to):
    cluster = await start_cluster(2, 2)
    traffic = traffic_to(cluster, seed=23)

    async def swap():
        for name, role in (("prefill-0", D), ("decode-0", P), ("decode-1", P), ("prefill-1", D)):
            await change(cluster, name, role)

    await under_load(cluster, traffic, 12, swap())
    await cluster.ready({P: 2, D: 2})
    await traffic.run(traffic.asks(4, **ASKS))
    await cluster.calm()


@pytest.mark.chaos
async def test_with_tls_and_with_ranks(start_cluster, traffic_to, tmp_path):
    cluster = await start_cluster(1, 1, tls=tls_files(make_certificates(tmp_path / "tls")))
    cluster.add(D, "engine.tp_size=2", name="decode-tp")
    await cluster.ready()
    traffic = traffic_to(cluster, seed=24)
    await under_load(cluster, traffic, 8, there_and_back(cluster, ("decode-tp", P)))
    await cluster.calm()


@pytest.mark.chaos
async def test_several_routers_one_of_which_sleeps_through_it(start_cluster, traffic_to):
    cluster = await start_cluster(2, 2)
    second = Cluster(cluster.model, cluster.directory)
    second.start_router()
    try:
        await second.ready({P: 2, D: 2})
        traffic, through_second = traffic_to(cluster, seed=25), traffic_to(second, seed=25)
        asks = traffic.asks(8, **ASKS)
        sent = traffic.send(asks[:4]) + through_second.send(asks[4:])
        await asyncio.sleep(0.5)
        await there_and_back(cluster, ("decode-0", P))
        await traffic.finish(asks, sent)
        assert second._router is not None
        second._router.signal(signal.SIGSTOP)
        await change(cluster, "prefill-1", D)
        second._router.signal(signal.SIGCONT)
        late = traffic.asks(6, **ASKS)
        await through_second.finish(late, through_second.send(late))
        await second.ready({P: 1, D: 3})
        assert await second.total("baton_router_role_changes_total") >= 1
        await cluster.calm()
    finally:
        await second.stop()


@pytest.mark.chaos
async def test_a_restarted_worker_is_back_in_the_pool_of_its_settings(start_cluster, traffic_to):
    cluster = await start_cluster(1, 2)
    traffic = traffic_to(cluster, seed=26)
    await change(cluster, "decode-0", P)
    await cluster.ready({P: 2, D: 1})
    cluster.kill("decode-0")
    await traffic.run(traffic.asks(2, **ASKS))
    cluster.restart("decode-0")
    await cluster.ready({P: 1, D: 2})
    info = (await cluster.info("decode-0")).info
    assert info.role_version == 1
    await cluster.calm()


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["decode-0", "decode-1"], ids=["changing", "taking over"])
async def test_a_worker_killed_while_another_changes(start_cluster, traffic_to, name):
    cluster = await start_cluster(1, 3)
    traffic = traffic_to(cluster, seed=27)
    asks = traffic.asks(8, **ASKS)
    sent = traffic.send(asks)
    await asyncio.sleep(1.0)
    changing = asyncio.create_task(change(cluster, "decode-0", P))
    await asyncio.sleep(0.2)
    cluster.kill(name)
    await asyncio.gather(changing, return_exceptions=True)
    await traffic.finish(asks, sent)
    await cluster.calm()


@pytest.mark.chaos
async def test_a_change_that_gets_rid_of_nothing_ends_nothing(start_cluster, traffic_to):
    cluster = await start_cluster(1, 2, router=("migration.enabled=false",))
    traffic = traffic_to(cluster, seed=28)
    asks = traffic.asks(4, prompt_tokens=200, max_tokens=400)
    begun = [asyncio.Event() for _ in asks]
    sent = [
        asyncio.create_task(cluster.generate(a.prompt, a.max_tokens, started=b))
        for a, b in zip(asks, begun, strict=True)
    ]
    async with asyncio.timeout(30):
        await asyncio.gather(*(event.wait() for event in begun))
    with pytest.raises(DeadlineExceeded, match="still ran"):
        await change(cluster, "decode-0", P, timeout_s=0.2)
    await traffic.finish(asks, sent)
    assert (await cluster.info("decode-0")).info.role_version == 1
    await cluster.ready()
    await cluster.calm()
