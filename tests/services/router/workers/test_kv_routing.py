"""From what workers say of their blocks to where requests go, and what is refused on the way."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

import pytest

from baton.core.block import chain_hashes, join_hashes, root_hash
from baton.core.errors import ConfigError
from baton.core.tier import Tier
from baton.core.worker_info import WorkerId
from baton.rpc.v1 import worker_pb2 as pb
from baton.telemetry.metrics import Metrics
from services.router.config import IndexConfig, SessionConfig
from services.router.index.prefix_index import PrefixIndex
from services.router.placement.policy_config import PolicyConfig
from services.router.workers.index_feed import IndexFeed
from services.router.workers.kv_feed import KvChange, KvFault

LONG = list(range(1, 101))
A = WorkerId("a")


def hashes_of(cluster, prompt):
    return chain_hashes(root_hash(cluster["p0"].layout.fingerprint), prompt, 16)


async def held(cluster, hashes, worker_id, expected):
    """Wait until the index says so of the three tiers."""
    index = cluster.core.pool.index
    async with asyncio.timeout(3):
        while True:
            match = index.match(hashes)
            if [match.num_blocks(worker_id, tier) for tier in Tier] == expected:
                return
            await asyncio.sleep(0.005)


async def test_tiers_come_with_snapshots_and_events(cluster):
    hashes = hashes_of(cluster, LONG)
    worker = cluster["p0"]
    await worker.kill()
    await worker.revive()
    worker.cached, worker.on_host, worker.on_disk = hashes[:2], hashes[2:4], hashes[4:5]
    await cluster.connected()
    await held(cluster, hashes, "p0", [2, 4, 5])
    worker.report(
        first_kv_sequence=1,
        kv_events=[
            pb.KvEvent(on_host=hashes[1], on_disk=hashes[3]),
            pb.KvEvent(removed=hashes[4], stored=hashes[1]),
        ],
    )
    await held(cluster, hashes, "p0", [2, 3, 4])
    worker.report(first_kv_sequence=3, kv_events=[pb.KvEvent(removed=join_hashes(hashes[:4]))])
    await held(cluster, hashes, "p0", [0, 0, 0])
    cluster.core.pool.index.check_integrity()


async def with_stranger(make_cluster, config, hashing):
    """p0 names blocks otherwise and says that it holds the prompt, p1 as this router does."""
    config = dataclasses.replace(config, policy=PolicyConfig(local_prefill_max_tokens=0))
    cluster = await make_cluster(2, 1, config=config)
    hashes = hashes_of(cluster, LONG)
    worker = cluster["p0"]
    await worker.kill()
    await worker.revive()
    worker.hashing, worker.cached = hashing, list(hashes)
    await cluster.connected()
    return cluster, hashes


async def test_worker_with_another_hash_seed_is_placed_by_load_and_seen(
    make_cluster, config, caplog
):
    with caplog.at_level(logging.WARNING):
        cluster, hashes = await with_stranger(
            make_cluster, config, pb.BlockHashing(scheme="blake2b-128/seeded")
        )
        cluster["p0"].store(hashes)
        await cluster.generate(LONG, 2)
        await held(cluster, hashes, "p0", [0, 0, 0])
    text = await cluster.rendered('baton_router_kv_unmatched{worker="p0"} 1.0')
    assert 'baton_router_kv_event_faults_total{reason="hashing"} 1.0' in text
    assert 'baton_router_kv_unmatched{worker="p1"}' not in text
    said = [r.message for r in caplog.records if "placed by load alone" in r.message]
    assert len(said) == 1 and "blake2b-128/seeded" in said[0]
    # The other has work: load decides, and the stranger is as good as any.
    cluster["p1"].set_load(queued_prefill_tokens=100_000)
    async with asyncio.timeout(5):
        while not cluster["p0"].submitted:
            cluster.assert_right(await cluster.generate(LONG, 2), LONG, 2)
    worker = cluster["p0"]
    await worker.kill()
    await worker.revive()
    worker.hashing, worker.cached = None, list(hashes)
    await cluster.connected()
    await held(cluster, hashes, "p0", [6, 6, 6])
    assert "baton_router_kv_unmatched{" not in await cluster.rendered()


async def test_snapshot_above_the_bound_leaves_the_others_known(make_cluster, config):
    config = dataclasses.replace(
        config, session=dataclasses.replace(config.session, max_snapshot_blocks=5)
    )
    cluster, hashes = await with_stranger(make_cluster, config, None)
    await cluster.rendered('baton_router_kv_unmatched{worker="p0"} 1.0')
    cluster["p1"].store(hashes[:3])
    await held(cluster, hashes, "p1", [3, 3, 3])
    await held(cluster, hashes, "p0", [0, 0, 0])
    text = await cluster.rendered()
    assert 'baton_router_kv_event_faults_total{reason="too_large"} 1.0' in text
    cluster.assert_right(await cluster.generate(LONG, 4), LONG, 4)


async def test_worker_whose_snapshot_no_message_holds_is_placed_by_load(make_cluster, config):
    cluster = await make_cluster(1, 1, config=config)
    worker, hashes = cluster["p0"], hashes_of(cluster, LONG)
    await worker.kill()
    await worker.revive()
    worker.num_left_out = 5_000_000
    await cluster.connected()
    text = await cluster.rendered('baton_router_kv_unmatched{worker="p0"} 1.0')
    assert 'baton_router_kv_event_faults_total{reason="too_large"} 1.0' in text
    worker.store(hashes)
    cluster.assert_right(await cluster.generate(LONG, 4), LONG, 4)
    await held(cluster, hashes, "p0", [0, 0, 0])
    assert worker.submitted and not worker.num_get_info


async def test_malformed_and_replayed_events_are_counted_and_requests_go_on(cluster):
    worker, hashes = cluster["d0"], hashes_of(cluster, LONG)
    worker.store(hashes[:2])
    await held(cluster, hashes, "d0", [2, 2, 2])
    running = asyncio.create_task(cluster.generate(LONG, 60))
    while not worker.live:
        await asyncio.sleep(0.002)
    worker.report(first_kv_sequence=1, kv_events=[pb.KvEvent(removed=hashes[0])])
    worker.report(first_kv_sequence=2, kv_events=[pb.KvEvent(stored=b"no hash")])
    worker.kv_sequence = 2
    text = await cluster.rendered('baton_router_kv_event_faults_total{reason="malformed"} 1.0')
    assert 'baton_router_kv_event_faults_total{reason="replayed"} 1.0' in text
    await held(cluster, hashes, "d0", [2, 2, 2])
    worker.store(hashes[2:3])
    await held(cluster, hashes, "d0", [3, 3, 3])
    cluster.assert_right(await running, LONG, 60)
    assert len(worker.submitted) == 1


async def test_prediction_lives_as_long_as_configured(make_cluster, config):
    config = dataclasses.replace(config, index=IndexConfig(predicted_ttl_s=0.3))
    cluster = await make_cluster(1, 1, config=config)
    predicted = cluster.core.dispatcher._starter._placer.predicted
    await cluster.generate(LONG, 2)
    assert len(predicted) == 1
    await asyncio.sleep(0.35)
    await cluster.generate(LONG[::-1], 2)
    assert len(predicted) == 1, "the first one is forgotten"


async def test_changes_reach_the_index_without_a_push_and_leave_no_timer():
    index = PrefixIndex(1000, max_pending=1000)
    metrics = Metrics()
    feed = IndexFeed(index, metrics)
    hashes = chain_hashes(root_hash("x"), range(64), 16)
    feed.ready(A, {Tier.DEVICE: hashes[0]}, "")
    feed.change(A, KvChange(removed=b"", on_disk=hashes[3], on_host=hashes[2], stored=hashes[1]))
    assert index.num_pending
    async with asyncio.timeout(2):
        while index.num_pending:
            await asyncio.sleep(0.001)
    assert [index.match(hashes).num_blocks(A, tier) for tier in Tier] == [2, 3, 4]
    assert b"baton_router_prefix_entries 4.0" in metrics.render()
    feed.forget(A)
    feed.close()
    await asyncio.sleep(0.01)
    assert index.num_pending, "nothing runs any more"


async def test_refusal_is_said_once_until_its_reason_changes(caplog):
    metrics = Metrics()
    feed = IndexFeed(PrefixIndex(10), metrics)
    with caplog.at_level(logging.WARNING):
        for reason in ("one", "one", "two"):
            feed.ready(A, {}, reason)
            feed.fault(KvFault.HASHING)
    assert len(caplog.records) == 2 and feed.refused == {A: "two"}
    assert b'baton_router_kv_event_faults_total{reason="hashing"} 3.0' in metrics.render()
    feed.forget(A)
    assert not feed.refused and b"baton_router_kv_unmatched{" not in metrics.render()
    feed.close()


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("index", "max_entries", 0),
        ("index", "max_entries", 1 << 40),
        ("index", "max_pending", -1),
        ("index", "predicted_ttl_s", 0),
        ("session", "max_snapshot_blocks", 0),
    ],
)
def test_settings_out_of_range_are_refused(section, field, value):
    with pytest.raises(ConfigError, match=f"{section}.{field}"):
        {"index": IndexConfig, "session": SessionConfig}[section](**{field: value})
