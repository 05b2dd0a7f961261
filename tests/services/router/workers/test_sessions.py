"""Sessions, membership and the picture they give of the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket

import grpc
import pytest

from baton.core.block import chain_hashes, join_hashes, root_hash
from baton.core.errors import WorkerLost
from baton.core.request import GenerateRequest, RequestId, SamplingParams, TokenDelta, Work
from baton.core.worker_info import WorkerId
from baton.rpc.v1 import worker_pb2 as pb
from baton.telemetry.metrics import Metrics
from services.router.index.prefix_index import PrefixIndex
from services.router.placement.policy_config import PolicyConfig
from services.router.requests.mailbox import Arrival, Mailbox
from services.router.workers.membership import PushMembership, StaticMembership
from services.router.workers.session_client import WorkerSession
from services.router.workers.session_listener import SessionState
from services.router.workers.worker_pool import WorkerPool

LONG = list(range(1, 101))
IDLE_TIMEOUT_S = 30.0
"""Longer than a busy machine keeps these processes waiting: nothing here falls silent by itself."""


@pytest.fixture
def config(config):
    session = dataclasses.replace(config.session, idle_timeout_s=IDLE_TIMEOUT_S)
    return dataclasses.replace(config, session=session)


@pytest.fixture
async def cluster(make_cluster, config):
    return await make_cluster(config=config)


def hashes_of(cluster, prompt):
    return chain_hashes(root_hash(cluster["p0"].layout.fingerprint), prompt, 16)


async def matched(cluster, hashes, expected):
    async with asyncio.timeout(10):
        while cluster.core.pool.index.match(hashes).by_worker() != expected:
            await asyncio.sleep(0.005)
    cluster.core.pool.index.check_integrity()


async def test_snapshot_and_increments_feed_the_index(cluster):
    hashes = hashes_of(cluster, LONG)
    cluster["p0"].store(hashes[:2])
    await matched(cluster, hashes, {"p0": 2})
    cluster["p0"].store(hashes[2:4])
    await matched(cluster, hashes, {"p0": 4})
    await cluster["d0"].kill()
    await cluster["d0"].revive()
    cluster["d0"].cached = hashes[:3]
    await cluster.connected()
    await matched(cluster, hashes, {"p0": 4, "d0": 3})


async def test_prefix_overlap_decides_the_placement(make_cluster, config):
    config = dataclasses.replace(config, policy=PolicyConfig(local_prefill_max_tokens=0))
    cluster = await make_cluster(3, 1, config=config)
    hashes = hashes_of(cluster, LONG)
    cluster["p1"].store(hashes)
    await matched(cluster, hashes, {"p1": 6})
    for _ in range(4):
        await cluster.generate(LONG, 2)
    assert len(cluster["p1"].submitted) == 4


async def test_worker_is_told_who_caches_more_of_its_prompt(cluster):
    prompt = list(range(1, 201))
    hashes = hashes_of(cluster, prompt)
    cluster["d0"].store(hashes[:7])
    cluster["p0"].store(hashes[:2])
    await matched(cluster, hashes, {"d0": 7, "p0": 2})
    await cluster.generate(prompt, 4)
    (prefill,), (decode,) = cluster["p0"].submitted, cluster["d0"].submitted
    assert prefill.work is Work.PREFILL and prefill.kv_source.worker_id == "d0"
    assert prefill.kv_source.address == cluster["d0"].address
    assert decode.work is Work.DECODE and decode.kv_source.worker_id == "p0"
    assert 'baton_prefix_offers_total{role="prefill"} 1.0' in await cluster.rendered()


async def test_worker_that_generates_alone_is_told_as_well(make_cluster, config):
    cluster = await make_cluster(1, 1, config=config)
    hashes = hashes_of(cluster, LONG)
    cluster["p0"].store(hashes[:5])
    await matched(cluster, hashes, {"p0": 5})
    cluster["p0"].load = dataclasses.replace(cluster["p0"].load, is_draining=True)
    cluster["p0"].report()
    async with asyncio.timeout(10):
        while len(cluster.core.pool.view().eligible(model="fake")) != 1:
            await asyncio.sleep(0.005)
    await cluster.generate(LONG, 4)
    (generate,) = cluster["d0"].submitted
    assert generate.work is Work.GENERATE and generate.kv_source.worker_id == "p0"
    assert 'baton_prefix_offers_total{role="decode"} 1.0' in await cluster.rendered()


async def test_nothing_is_offered_where_it_cannot_pay(cluster, caplog):
    hashes = hashes_of(cluster, LONG)
    cluster["d0"].store(hashes[:1])
    await matched(cluster, hashes, {"d0": 1})
    await cluster.generate(LONG, 4)
    (prefill,) = cluster["p0"].submitted
    assert prefill.kv_source is None
    assert 'baton_prefix_offers_total{role="prefill"} 0.0' in await cluster.rendered()


async def test_gap_in_kv_events_is_repaired_without_losing_requests(cluster):
    hashes = hashes_of(cluster, LONG)
    cluster["d0"].store(hashes[:1])
    await matched(cluster, hashes, {"d0": 1})
    running = asyncio.create_task(cluster.generate(LONG, 60))
    while not cluster["d0"].live:
        await asyncio.sleep(0.002)
    cluster["d0"].store(hashes[1:3], skip=2)
    cluster["d0"].store(hashes[3:4])
    await matched(cluster, hashes, {"d0": 4})
    assert cluster["d0"].num_get_info == 1
    cluster.assert_right(await running, LONG, 60)
    assert len(cluster["d0"].submitted) == 1
    cluster["d0"].store(hashes[4:5])
    await matched(cluster, hashes, {"d0": 5})
    assert cluster["d0"].num_get_info == 1


async def test_events_that_a_snapshot_contains_are_no_gap_and_not_applied_again(cluster):
    worker, hashes = cluster["d0"], hashes_of(cluster, LONG)
    worker.store(hashes[:2], skip=4)
    await matched(cluster, hashes, {"d0": 2})
    worker.report(first_kv_sequence=3, kv_events=[pb.KvEvent(removed=join_hashes(hashes[:1]))])
    worker.kv_sequence = 6
    worker.report(
        first_kv_sequence=4,
        kv_events=[
            pb.KvEvent(removed=join_hashes(hashes[:1])),
            pb.KvEvent(stored=join_hashes(hashes[:2])),
            pb.KvEvent(stored=join_hashes(hashes[2:3])),
        ],
    )
    await matched(cluster, hashes, {"d0": 3})
    worker.store(hashes[3:4])
    await matched(cluster, hashes, {"d0": 4})
    assert worker.num_get_info == 1


async def test_slow_welcome_is_waited_for_longer_than_the_connection(make_cluster, config):
    session = dataclasses.replace(config.session, connect_timeout_s=0.2, welcome_timeout_s=5.0)
    cluster = await make_cluster(config=dataclasses.replace(config, session=session))
    await cluster["d0"].kill()
    await cluster.connected("p0")
    cluster["d0"].faults.welcome_delay_s = 0.6
    await cluster["d0"].start()
    await cluster.connected(timeout_s=4.0)


async def test_stopped_process_behind_an_open_port_is_given_up_soon(config):
    # The kernel completes connections to a listening socket whoever does not accept them.
    session_config = dataclasses.replace(
        config.session, connect_timeout_s=0.2, welcome_timeout_s=60.0
    )
    pool = WorkerPool(router_id="r", config=session_config, index=PrefixIndex(10))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        session = WorkerSession(address, router_id="r", config=session_config, listener=pool)
        running = asyncio.create_task(session.run())
        async with asyncio.timeout(3):
            while session.state is not SessionState.LOST:
                await asyncio.sleep(0.01)
        assert session.lost_reason == "no connection within 0.2 s"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class RawWorker:
    """Sends bytes where messages belong."""

    def __init__(self, *messages: bytes, snapshot: bytes = b"") -> None:
        self.messages = messages
        self.snapshot = snapshot
        self.num_sessions = 0

    @contextlib.asynccontextmanager
    async def running(self):
        """Its address."""
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._session),
            "GetInfo": grpc.unary_unary_rpc_method_handler(self._info),
        }
        server = grpc.aio.server()
        name = pb.DESCRIPTOR.services_by_name["Worker"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(grace=None)

    async def _session(self, requests, context):
        self.num_sessions += 1
        await anext(requests)
        for message in self.messages:
            await context.write(message)
        await asyncio.sleep(60)

    async def _info(self, request, context):
        return self.snapshot


@contextlib.asynccontextmanager
async def pool_of(worker, session_config):
    """A pool with one session to `worker`, and its metrics."""
    metrics = Metrics()
    pool = WorkerPool(router_id="r", config=session_config, index=PrefixIndex(10), metrics=metrics)
    async with worker.running() as address:
        pool.start(StaticMembership([address]))
        yield pool, metrics
        await pool.stop()


async def shown(metrics, line):
    async with asyncio.timeout(10):
        while line not in metrics.render().decode():
            await asyncio.sleep(0.01)


def welcome_of(cluster):
    return pb.WorkerMessage(welcome=cluster["d0"]._welcome())


GARBAGE = b"\xff\xff\xff"


async def test_worker_whose_first_message_is_garbage_is_refused_with_a_reason(config, caplog):
    for first in (GARBAGE, pb.WorkerMessage(step=pb.StepBatch()).SerializeToString()):
        async with pool_of(RawWorker(first), config.session) as (_, metrics):
            await shown(metrics, "baton_router_session_faults_total 2.0")
    said = [r.message for r in caplog.records if r.message.startswith("no session with")]
    assert len(said) == 2, "each reason once, however often it is tried"
    assert "a message that cannot be decoded" in said[0] and "not Welcome" in said[1]
    assert not [r for r in caplog.records if r.name.startswith("services") and r.exc_info]


async def test_worker_that_turns_to_garbage_is_left_alone_a_while(cluster, config, caplog):
    session_config = dataclasses.replace(config.session, stall_quarantine_s=30.0)
    worker = RawWorker(welcome_of(cluster).SerializeToString(), GARBAGE)
    async with pool_of(worker, session_config) as (pool, metrics):
        await shown(metrics, "baton_router_session_faults_total 1.0")
        await asyncio.sleep(5 * session_config.backoff_min_s)
        assert worker.num_sessions == 1, "its Welcome is not asked for again and again"
        (state,) = pool.view().workers
        assert state.is_quarantined
    assert any("a message that cannot be decoded" in r.message for r in caplog.records)
    assert not [r for r in caplog.records if r.name.startswith("services") and r.exc_info]


async def test_worker_whose_snapshot_is_garbage_is_placed_by_load_alone(cluster, config, caplog):
    event = pb.StepBatch(first_kv_sequence=5, kv_events=[pb.KvEvent(stored=bytes(16))])
    messages = (welcome_of(cluster), pb.WorkerMessage(step=event))
    worker = RawWorker(*(m.SerializeToString() for m in messages), snapshot=GARBAGE)
    async with pool_of(worker, config.session) as (pool, metrics):
        await shown(metrics, 'baton_router_kv_unmatched{worker="d0"} 1.0')
        assert 'faults_total{reason="malformed"} 1.0' in metrics.render().decode()
        assert pool.session(WorkerId("d0")).is_ready and worker.num_sessions == 1
    assert not [r for r in caplog.records if r.name.startswith("services") and r.exc_info]


async def test_unhealthy_worker_gets_no_work_and_does_not_count_as_answering(make_cluster, config):
    cluster = await make_cluster(1, 2, config=config)
    for name in ("d0", "p0"):
        cluster[name].load = dataclasses.replace(cluster[name].load, is_unhealthy=True)
        cluster[name].report()
    async with asyncio.timeout(10):
        while len(cluster.core.pool.view().eligible(model="fake")) != 1:
            await asyncio.sleep(0.005)
    for _ in range(3):
        cluster.assert_right(await cluster.generate(LONG, 4), LONG, 4)
    assert not cluster["d0"].submitted and not cluster["p0"].submitted
    health = await cluster.core.dispatcher.health()
    assert health.detail["workers_answering"] == {"prefill": 0, "decode": 1}


async def test_lost_worker_leaves_the_index_and_comes_back_with_its_own_past(cluster):
    hashes = hashes_of(cluster, LONG)
    cluster["p0"].store(hashes)
    await matched(cluster, hashes, {"p0": 6})
    await cluster["p0"].kill()
    await matched(cluster, hashes, {})
    await cluster["p0"].revive()
    await cluster.connected()
    assert cluster.core.pool.index.match(hashes).by_worker() == {}
    assert cluster.core.pool.session(WorkerId("p0")).info.epoch == "2"


async def test_view_carries_load_and_what_was_just_sent(cluster):
    cluster["d0"].load = dataclasses.replace(cluster["d0"].load, num_running=7, free_blocks=9)
    cluster["d0"].report()
    async with asyncio.timeout(10):
        while cluster.core.pool.view().get(WorkerId("d0")).load.num_running != 7:
            await asyncio.sleep(0.005)
    session = cluster.core.pool.session(WorkerId("d0"))
    mailbox = Mailbox(4, now_s=0.0)
    request = GenerateRequest(RequestId("x"), Work.GENERATE, (1, 2), SamplingParams())
    session.submit(request, mailbox, prefill_tokens=50, kv_tokens=70)
    state = cluster.core.pool.view().get(WorkerId("d0"))
    assert (state.unreported_prefill_tokens, state.unreported_kv_tokens) == (50, 70)
    assert state.num_in_flight == 1
    session.cancel(RequestId("x"), "test")
    state = cluster.core.pool.view().get(WorkerId("d0"))
    assert (state.unreported_prefill_tokens, state.num_in_flight) == (0, 0)


async def test_worker_that_falls_silent_is_broken_off_at_the_limit(cluster):
    session = cluster.core.pool.session(WorkerId("d0"))
    session.check_idle(session.last_message_at_s + IDLE_TIMEOUT_S)
    assert session.is_ready
    session.check_idle(session.last_message_at_s + IDLE_TIMEOUT_S + 0.1)
    assert session.state is SessionState.LOST and session.lost_reason == "no message for 30.1 s"
    await cluster.connected()


async def test_submit_to_a_lost_worker_is_an_error_at_once(cluster):
    session = cluster.core.pool.session(WorkerId("d0"))
    await cluster["d0"].kill()
    await cluster.connected("p0")
    with pytest.raises(WorkerLost):
        cluster.core.pool.session(WorkerId("d0"))
    request = GenerateRequest(RequestId("x"), Work.GENERATE, (1,), SamplingParams())
    with pytest.raises(WorkerLost):
        session.submit(request, Mailbox(4, now_s=0.0), prefill_tokens=0, kv_tokens=0)


async def test_another_worker_at_the_same_address_is_recognised(cluster):
    await cluster["d0"].kill()
    cluster["d0"].worker_id = WorkerId("d9")
    await cluster["d0"].revive()
    await cluster.connected("p0", "d9")
    assert len(cluster.core.pool.sessions()) == 2


async def test_workers_join_and_leave_by_membership(make_cluster, config):
    cluster = await make_cluster(1, 2, config=config)
    everyone = {w.worker_id: w.address for w in cluster.workers.values()}
    cluster.membership.update({k: v for k, v in everyone.items() if k != "d1"})
    await cluster.connected("p0", "d0")
    cluster.membership.update(everyone)
    await cluster.connected("p0", "d0", "d1")
    cluster.membership.update({})
    async with asyncio.timeout(10):
        while cluster.core.pool.view().workers:
            await asyncio.sleep(0.01)


async def test_push_membership_gives_the_latest_snapshot_to_late_watchers():
    membership = PushMembership()
    membership.update({WorkerId("a"): "h:1"})
    watch = membership.watch()
    assert await anext(watch) == {"a": "h:1"}
    pending = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    membership.update({WorkerId("b"): "h:2"})
    assert await asyncio.wait_for(pending, 1) == {"b": "h:2"}
    await watch.aclose()


async def test_static_membership_lists_its_addresses():
    snapshots = [s async for s in StaticMembership(["h:1", "h:2"]).watch()]
    assert [set(s.values()) for s in snapshots] == [{"h:1", "h:2"}]


async def test_mailbox_merges_instead_of_growing():
    mailbox = Mailbox(3, now_s=0.0)
    for k in range(10):
        mailbox.put(Arrival("w", 0.0, TokenDelta("r", k, [k])), 1.0)
    mailbox.put(Arrival("other", 0.0, TokenDelta("r", 10, [10])), 2.0)
    mailbox.put(Arrival("other", 0.0, lost="gone"), 3.0)
    items = await mailbox.take()
    assert [i.delta.token_ids for i in items[:-1]] == [[0], [1], list(range(2, 10)), [10]]
    assert items[-1].lost == "gone" and mailbox.last_put_at_s == 3.0
    waiting = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(Arrival("w", 0.0, TokenDelta("r", 11, [11])), 4.0)
    assert len(await asyncio.wait_for(waiting, 1)) == 1
