"""A worker times its links on demand and says what is wrong with them."""

import asyncio

import grpc
import pytest

from baton.core.fabric import LinkReport
from baton.core.request import PeerRef
from baton.core.worker_info import Epoch, Role, WorkerId
from baton.rpc.convert import peer_to_wire
from baton.rpc.v1 import transfer_pb2 as pb
from baton.rpc.v1.transfer_pb2_grpc import TransferStub
from services.worker.link_check import MAX_ROUNDS, findings_of, memory_bytes_per_second

GB = 1e9


def link(peer="p", transport="shm", lane="mapped memory", rate=8 * GB, latency_s=1e-4, reason=""):
    return LinkReport(WorkerId(peer), Epoch("e"), transport, lane, rate, latency_s, reason)


def test_good_link_gives_no_finding():
    assert findings_of([link()], 10 * GB, {"p"}) == []


@pytest.mark.parametrize(
    ("bad", "same_host", "words"),
    [
        (link(transport="", reason="connection refused"), set(), "p cannot be read: connection"),
        (link(rate=GB), {"p"}, "1.00 GB/s, a memory copy here makes 10.00 GB/s"),
        (link(latency_s=0.02), set(), "one block takes 20.0 ms"),
        (link(reason="nixl: no ptrace right"), {"p"}, "faster way was not taken: nixl: no ptrace"),
        (
            link(transport="socket", lane="tcp", reason="shm: another user"),
            {"p"},
            "although both run on one host: shm: another user",
        ),
    ],
)
def test_each_fault_is_named(bad, same_host, words):
    (finding,) = findings_of([bad], 10 * GB, same_host)
    assert words in finding


def test_slow_link_to_another_host_is_no_fault():
    assert findings_of([link(transport="socket", lane="tcp", rate=GB)], 10 * GB, set()) == []


def test_worker_without_peers_says_so():
    (finding,) = findings_of([], 10 * GB, set())
    assert "knows no peer" in finding


def test_memory_copies_at_some_rate():
    assert memory_bytes_per_second() > 1e8


async def measure(worker, asker, peers=(), num_rounds=2):
    """As a tool of the deployment does."""
    stub = TransferStub(worker.channel)
    who = pb.ChallengeRequest(worker_id=asker.info.worker_id, epoch=asker.info.epoch)
    nonce = (await stub.Challenge(who, timeout=5)).nonce
    request = pb.MeasureRequest(
        peers=map(peer_to_wire, peers),
        num_rounds=num_rounds,
        card=asker.server._backend.transport.card(nonce),
        challenge=nonce,
    )
    return await stub.Measure(request, timeout=20)


@pytest.fixture
async def pair(workers):
    return await workers.start(Role.PREFILL), await workers.start(Role.DECODE)


async def test_links_are_measured_and_told_to_routers(pair, wait_for):
    owner, reader = pair
    router = await reader.router()
    reply = await measure(reader, owner, [owner.peer])
    (measured,) = reply.links
    assert (measured.peer_id, measured.transport) == (owner.info.worker_id, "shm")
    assert measured.bytes_per_second > 0 and reply.memory_bytes_per_second > 1e8
    await wait_for(lambda: router.link(owner.info.worker_id) is not None)
    again = await measure(reader, owner)
    assert [each.peer_id for each in again.links] == [owner.info.worker_id]


async def test_unreachable_peer_is_a_finding(pair):
    owner, reader = pair
    gone = PeerRef(WorkerId("gone"), Epoch("e"), "127.0.0.1:1")
    reply = await measure(reader, owner, [gone])
    assert reply.links[0].transport == ""
    assert any("gone cannot be read" in finding for finding in reply.findings)


async def test_stranger_may_not_measure(pair, workers):
    _, reader = pair
    stranger = await workers.start(Role.DECODE, secret="f" * 16)
    with pytest.raises(grpc.aio.AioRpcError, match="signature") as refused:
        await measure(reader, stranger)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_rounds_are_limited(pair):
    owner, reader = pair
    with pytest.raises(grpc.aio.AioRpcError, match="limits") as refused:
        await measure(reader, owner, num_rounds=MAX_ROUNDS + 1)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_one_measurement_at_a_time(pair):
    owner, reader = pair
    results = await asyncio.gather(
        *(measure(reader, owner, [owner.peer], 20) for _ in range(3)), return_exceptions=True
    )
    refused = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
    assert len(refused) == 2
    assert all("another measurement" in r.details() for r in refused)
