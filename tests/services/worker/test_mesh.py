"""Links are there before a request needs them, come back, and go when nobody wants them."""

import asyncio

import pytest

from baton.core.request import PeerRef, Work
from baton.core.worker_info import Epoch, Role, WorkerId
from services.worker import mesh, wanted_peers

PROMPT = tuple(range(1, 23))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(mesh, "TICK_S", 0.02)
    monkeypatch.setattr(wanted_peers, "FIRST_RETRY_S", 0.05)


def has_link(router, peer, epoch=None):
    link = router.link(peer.worker_id)
    return bool(link and link.transport) and epoch in (None, link.peer_epoch)


async def test_listed_peer_is_connected_without_a_request(workers, wait_for):
    owner, reader = await workers.start(Role.PREFILL), await workers.start(Role.DECODE)
    router = await reader.router()
    await wait_for(lambda: router.fabric is not None)
    assert router.fabric.links == ()
    await router.tell_peers(owner.peer, reader.peer)
    await wait_for(lambda: has_link(router, owner.peer))
    link = router.link(owner.info.worker_id)
    assert (link.peer_epoch, link.transport) == (owner.info.epoch, "shm")
    assert link.bytes_per_second > 0 and link.latency_s > 0
    assert len(router.fabric.links) == 1
    assert reader.server.parts.mesh.is_ready(owner.peer)


async def test_router_that_comes_later_is_told_of_the_links(workers, wait_for):
    owner, reader = await workers.start(Role.PREFILL), await workers.start(Role.DECODE)
    first = await reader.router("first")
    await first.tell_peers(owner.peer)
    await wait_for(lambda: has_link(first, owner.peer))
    second = await reader.router("second")
    await wait_for(lambda: has_link(second, owner.peer))


async def test_counters_are_told_while_they_change_and_not_at_rest(workers, wait_for, make_request):
    owner, reader = await workers.start(Role.PREFILL), await workers.start(Role.DECODE)
    on_owner, on_reader = await owner.router(), await reader.router()
    fields = {"max_tokens": 4}
    await on_reader.submit(make_request("a", PROMPT, work=Work.DECODE, peer=owner.peer, **fields))
    await on_owner.submit(make_request("a", PROMPT, work=Work.PREFILL, **fields))
    await on_reader.ended("a")
    await wait_for(lambda: on_reader.fabric.counters.read_bytes > 0)
    assert on_reader.fabric.counters.reads >= 1
    told = on_reader.num_fabrics
    await asyncio.sleep(0.5)
    assert on_reader.num_fabrics == told


@pytest.mark.parametrize("restarted", ["owner", "reader"])
async def test_restarted_worker_is_connected_again(workers, wait_for, restarted):
    owner = await workers.start(Role.PREFILL, name="p")
    reader = await workers.start(Role.DECODE, name="d")
    router = await reader.router()
    await router.tell_peers(owner.peer)
    await wait_for(lambda: has_link(router, owner.peer))
    if restarted == "owner":
        await owner.server.stop(drain_s=0)
        await wait_for(lambda: not has_link(router, owner.peer))
        owner = await workers.start(Role.PREFILL, name="p")
    else:
        await reader.server.stop(drain_s=0)
        reader = await workers.start(Role.DECODE, name="d")
        router = await reader.router()
    await router.tell_peers(owner.peer)
    await wait_for(lambda: has_link(router, owner.peer, owner.info.epoch))


async def test_owner_that_comes_back_before_the_router_knows_is_not_the_old_one(workers, wait_for):
    owner = await workers.start(Role.PREFILL, name="p")
    reader = await workers.start(Role.DECODE)
    router = await reader.router()
    await router.tell_peers(owner.peer)
    await wait_for(lambda: has_link(router, owner.peer))
    port = int(owner.info.address.rpartition(":")[2])
    await owner.server.stop(drain_s=0)
    again = await workers.start(Role.PREFILL, name="p", port=port)
    await wait_for(lambda: "restarted" in (router.link("p") or owner).reason)
    await router.tell_peers(again.peer)
    await wait_for(lambda: has_link(router, again.peer, again.info.epoch))


async def test_unreachable_peer_is_reported_with_its_reason_and_tried_again(workers, wait_for):
    reader = await workers.start(Role.DECODE)
    router = await reader.router()
    gone = PeerRef(WorkerId("gone"), Epoch("e"), "127.0.0.1:1")
    await router.tell_peers(gone)
    await wait_for(lambda: router.link("gone") is not None)
    assert "unreachable" in router.link("gone").reason
    assert router.link("gone").transport == ""
    await router.tell_peers()
    await asyncio.sleep(0.2)
    assert router.fabric.counters.refused_peers == 0


async def test_refused_peer_is_reported_on_both_sides(workers, wait_for, caplog):
    owner = await workers.start(Role.PREFILL, secret="f" * 16)
    reader = await workers.start(Role.DECODE)
    on_owner, on_reader = await owner.router(), await reader.router()
    await on_reader.tell_peers(owner.peer)
    await wait_for(lambda: on_reader.link(owner.info.worker_id) is not None)
    assert "signature" in on_reader.link(owner.info.worker_id).reason
    await wait_for(lambda: on_reader.fabric.counters.refused_peers == 1)
    await wait_for(lambda: on_owner.fabric.counters.refused_peers >= 1)
    assert "signature" in caplog.text


async def test_link_that_nobody_wants_is_closed_when_idle(workers, wait_for, monkeypatch):
    monkeypatch.setattr(mesh, "IDLE_S", 0.1)
    owner, reader = await workers.start(Role.PREFILL), await workers.start(Role.DECODE)
    router = await reader.router()
    await router.tell_peers(owner.peer)
    await wait_for(lambda: has_link(router, owner.peer))
    await asyncio.sleep(0.3)
    assert has_link(router, owner.peer)
    await router.tell_peers()
    await wait_for(lambda: router.link(owner.info.worker_id) is None)
    assert not reader.server.parts.mesh.is_ready(owner.peer)
    await router.tell_peers(owner.peer)
    await wait_for(lambda: has_link(router, owner.peer))


async def test_peers_of_a_router_that_left_are_forgotten(workers, wait_for, monkeypatch):
    monkeypatch.setattr(mesh, "IDLE_S", 0.1)
    owner, reader = await workers.start(Role.PREFILL), await workers.start(Role.DECODE)
    leaving, staying = await reader.router("leaving"), await reader.router("staying")
    await leaving.tell_peers(owner.peer)
    await wait_for(lambda: has_link(staying, owner.peer))
    await leaving.close()
    await wait_for(lambda: staying.link(owner.info.worker_id) is None)


async def test_idle_link_is_kept_while_a_request_reads_through_it(
    workers, wait_for, monkeypatch, make_request, expected
):
    monkeypatch.setattr(mesh, "IDLE_S", 0.05)
    owner = await workers.start(Role.PREFILL, step_s=0.1)
    reader = await workers.start(Role.DECODE)
    on_owner, on_reader = await owner.router(), await reader.router()
    prompt = tuple(range(1, 90))
    await on_reader.submit(
        make_request("a", prompt, work=Work.DECODE, peer=owner.peer, max_tokens=4)
    )
    await on_owner.submit(make_request("a", prompt, work=Work.PREFILL, max_tokens=4))
    end = await on_reader.ended("a")
    assert not end.error
    assert on_owner.tokens("a") + on_reader.tokens("a") == expected(prompt, 4)
    await wait_for(lambda: on_reader.link(owner.info.worker_id) is None)
    await owner.assert_nothing_leaked()
    await reader.assert_nothing_leaked()
