"""Blocks that the pool has evicted come back from the host and the disk tier."""

import asyncio

import pytest

from baton.core.fabric import TierName
from baton.core.lifecycle import LifecycleEvent, Timeline
from baton.core.worker_info import Role
from kvtransfer.tiers.config import TierConfig

PROMPT = tuple(i % 97 for i in range(1, 82))
"""20 blocks and a token."""
NUM_BLOCKS = 28
HOST = TierConfig(host_bytes=1 << 16, save_below_free_ratio=0.9)


def slow(worker, seconds_per_token=0.01):
    """The worker has found that it computes slowly: a restore pays."""
    points = {LifecycleEvent.PREFILL_STARTED: 0.0, LifecycleEvent.PREFILL_ENDED: 0.0}
    points[LifecycleEvent.PREFILL_ENDED] = 1000 * seconds_per_token
    worker.server.parts.imports.computed(1000, Timeline(points))


@pytest.fixture
def evict(make_request):
    """Computes other prompts until nothing of PROMPT can be in the pool."""

    async def run(worker, router):
        parts = worker.server.parts
        for number in range(2):
            other = tuple((number * 31 + 7 * i) % 89 for i in range(100))
            await router.submit(make_request(f"other{number}", other, max_tokens=2))
            await router.ended(f"other{number}")
        async with asyncio.timeout(5):
            while parts.engine._engine.load().leases:
                await asyncio.sleep(0.01)

    return run


async def saved(worker, num_blocks):
    async with asyncio.timeout(5):
        while worker.server.parts.fabric.report().counters.saved_blocks < num_blocks:
            await asyncio.sleep(0.01)


async def test_evicted_prefix_is_restored_from_host_memory(
    workers, make_request, expected, evict, wait_for
):
    worker = await workers.start(Role.PREFILL, num_blocks=NUM_BLOCKS, tiers=HOST)
    router = await worker.router()
    await router.submit(make_request("first", PROMPT, max_tokens=4))
    await router.ended("first")
    await saved(worker, 20)
    await evict(worker, router)
    slow(worker)
    await router.submit(make_request("again", PROMPT, max_tokens=4))
    end = await router.ended("again")
    assert end.num_cached_tokens == 80
    assert router.tokens("again") == expected(PROMPT, 4)
    await wait_for(lambda: router.fabric.counters.restored_blocks == 20)
    (report,) = [tier for tier in router.fabric.tiers if tier.tier is TierName.HOST]
    assert report.num_blocks >= 20 and report.max_bytes == HOST.host_bytes
    await worker.assert_nothing_leaked()


async def test_prefix_is_restored_from_disk_after_a_restart(
    workers, make_request, expected, tmp_path, evict
):
    tiers = TierConfig(
        host_bytes=1 << 16,
        disk_bytes=16 << 20,
        disk_path=tmp_path / "tier",
        save_below_free_ratio=0.9,
    )
    first = await workers.start(Role.PREFILL, name="p", num_blocks=NUM_BLOCKS, tiers=tiers)
    router = await first.router()
    await router.submit(make_request("first", PROMPT, max_tokens=4))
    await router.ended("first")
    await saved(first, 20)
    await first.server.stop(drain_s=0)

    second = await workers.start(Role.PREFILL, name="p", num_blocks=NUM_BLOCKS, tiers=tiers)
    router = await second.router()
    slow(second)
    async with asyncio.timeout(5):
        while not second.server.parts.tiering.restorable(make_request("x", PROMPT).block_hashes):
            await asyncio.sleep(0.02)
    await router.submit(make_request("again", PROMPT, max_tokens=4))
    end = await router.ended("again")
    assert end.num_cached_tokens == 80
    assert router.tokens("again") == expected(PROMPT, 4)
    await second.assert_nothing_leaked()


async def test_rest_of_a_prefix_comes_from_a_peer(workers, make_request, expected, evict):
    worker = await workers.start(Role.PREFILL, num_blocks=40, tiers=HOST)
    peer = await workers.start(Role.PREFILL)
    router, on_peer = await worker.router(), await peer.router()
    longer = (*PROMPT, *range(40))
    await on_peer.submit(make_request("long", longer, max_tokens=2))
    await on_peer.ended("long")
    await router.submit(make_request("first", PROMPT, max_tokens=4))
    await router.ended("first")
    await saved(worker, 20)
    await evict(worker, router)
    slow(worker)
    await worker.server.parts.mesh.link_to(peer.peer).ready()
    await router.submit(make_request("again", longer, peer=peer.peer, max_tokens=4))
    end = await router.ended("again")
    assert end.num_cached_tokens == 120
    assert router.tokens("again") == expected(longer, 4)
    counters = worker.server.parts.fabric.report().counters
    assert counters.restored_blocks + counters.fetched_blocks >= 20
    assert counters.fetched_blocks >= 10
    await worker.assert_nothing_leaked()
    await peer.assert_nothing_leaked()


async def test_cancelled_while_blocks_are_restored(
    workers, make_request, evict, monkeypatch, expected
):
    worker = await workers.start(Role.PREFILL, num_blocks=NUM_BLOCKS, tiers=HOST)
    router = await worker.router()
    await router.submit(make_request("first", PROMPT, max_tokens=4))
    await router.ended("first")
    await saved(worker, 20)
    await evict(worker, router)
    slow(worker, 0.1)
    tiering, asked = worker.server.parts.tiering, asyncio.Event()
    restore = tiering.restore

    async def late(hashes, block_ids):
        asked.set()
        await asyncio.sleep(0.2)
        return await restore(hashes, block_ids)

    monkeypatch.setattr(tiering, "restore", late)
    await router.submit(make_request("again", PROMPT, max_tokens=4))
    await asyncio.wait_for(asked.wait(), 5)
    await router.cancel("again")
    await router.ended("again")
    await worker.assert_nothing_leaked()
    monkeypatch.setattr(tiering, "restore", restore)
    await router.submit(make_request("once more", PROMPT, max_tokens=4))
    await router.ended("once more")
    assert router.tokens("once more") == expected(PROMPT, 4)
    await worker.assert_nothing_leaked()
