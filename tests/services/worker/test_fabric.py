"""What a worker says of its links, and when it says it."""

import dataclasses

import pytest

from baton.core.fabric import FabricReport, LinkReport, TierName, TierReport
from baton.core.request import PeerRef, Work
from baton.core.worker_info import Epoch, Role, WorkerId
from baton.rpc.convert import fabric_from_wire
from services.worker import fabric as fabric_module
from services.worker.config import SessionConfig
from services.worker.fabric import Fabric
from services.worker.session import RouterSession, Sessions


def link(peer, transport="shm"):
    return LinkReport(WorkerId(peer), Epoch("e"), transport, "mapped memory", 1e9, 1e-4)


def ref(peer):
    return PeerRef(WorkerId(peer), Epoch("e"), "host:1")


@pytest.fixture
async def session():
    return RouterSession("r", SessionConfig())


@pytest.fixture
def fabric(session):
    sessions = Sessions()
    sessions.open(session)
    return Fabric(sessions)


def told(session):
    """What the router is told next; None when nothing."""
    messages = session.outbox.take_messages()
    assert all(message.HasField("fabric") for message in messages)
    return fabric_from_wire(messages[-1].fabric) if messages else None


def test_links_are_told_as_they_come_change_and_go(fabric, session):
    fabric.linked(link("a"))
    assert told(session).links == (link("a"),)
    fabric.unlinked(ref("a"), "the stream broke", is_refused=False)
    (lost,) = told(session).links
    assert (lost.transport, lost.reason) == ("", "the stream broke")
    fabric.forget(WorkerId("a"))
    assert told(session) == FabricReport()
    fabric.forget(WorkerId("a"))
    assert told(session) is None


def test_same_failure_is_told_and_counted_once(fabric, session):
    for _ in range(3):
        fabric.unlinked(ref("a"), "layout differs", is_refused=True)
    assert told(session).counters.refused_peers == 1
    assert told(session) is None


def test_counters_are_told_once_per_change(fabric, session):
    counted = {"reads": 0}
    fabric.add_counts(lambda counters: setattr(counters, "reads", counted["reads"]))
    fabric.tell_if_changed()
    assert told(session) is None
    counted["reads"] = 3
    fabric.tell_if_changed()
    assert told(session).counters.reads == 3
    fabric.tell_if_changed()
    assert told(session) is None


def test_tiers_are_part_of_the_report(fabric, session):
    tier = TierReport(TierName.HOST, 1, 32, 64)
    fabric.attach_tiers(lambda: (tier,))
    fabric.tell_if_changed()
    assert told(session).tiers == (tier,)


def test_later_report_replaces_one_that_waits(fabric, session):
    fabric.linked(link("a"))
    fabric.linked(link("b"))
    (message,) = session.outbox.take_messages()
    assert len(message.fabric.links) == 2
    assert session.outbox.is_empty


def test_number_of_links_is_bounded_and_failed_ones_go_first(fabric, monkeypatch):
    monkeypatch.setattr(fabric_module, "MAX_LINKS", 3)
    fabric.linked(link("a"))
    fabric.unlinked(ref("b"), "unreachable", is_refused=False)
    fabric.linked(link("c"))
    fabric.linked(link("d"))
    assert [each.peer_id for each in fabric.report().links] == ["a", "c", "d"]


def test_report_does_not_change_afterwards(fabric):
    report = fabric.report()
    fabric.counters.refused_peers += 1
    assert report.counters.refused_peers == 0
    assert dataclasses.replace(report).counters.refused_peers == 0


async def test_recycles_and_expired_leases_reach_the_routers(workers, make_request, wait_for):
    owner = await workers.start(Role.PREFILL, lease_s=0.2)
    router = await owner.router()
    await router.submit(make_request("a", range(1, 20), work=Work.PREFILL, max_tokens=5))
    await router.ended("a")
    await owner.server._backend.transport.recycle()

    def is_counted():
        counters = router.fabric.counters if router.fabric is not None else None
        return counters is not None and (counters.recycles, counters.expired_leases) == (1, 1)

    await wait_for(is_counted)
    await owner.assert_nothing_leaked()
