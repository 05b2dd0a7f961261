from __future__ import annotations

import numpy as np
import pytest

from baton.core.fabric import LinkReport
from baton.core.worker_info import Epoch, WorkerId
from services.router.placement.topology import NO_LINK_S, LinkPrices, Topology, host_of, is_one_host

PRICES = LinkPrices(bytes_per_second=1e9, latency_s=0.001, host_bytes_per_second=5e9)


def topology(*hosts):
    made = Topology(PRICES, capacity=8)
    for row, host in enumerate(hosts):
        made.join(row, host)
    return made


def cost(made, reader, source):
    seconds, latency = made.costs(np.array([reader]), np.array([source]))
    return float(seconds[0, 0]), float(latency[0, 0])


def link(rate=0.0, latency_s=0.0, *, transport="nixl", lane="", reason=""):
    return LinkReport(WorkerId("x"), Epoch("1"), transport, lane, rate, latency_s, reason)


def test_assumptions_hold_until_somebody_has_measured():
    made = topology("a", "a", "b")
    assert cost(made, 0, 1) == (1 / 5e9, 0.001)
    assert cost(made, 0, 2) == (1e-9, 0.001)
    made.report(0, 2, link(4e9, 0.0001))
    assert cost(made, 0, 2) == (1 / 4e9, 0.0001)
    # Nothing better is known of the way back.
    assert cost(made, 2, 0) == (1 / 4e9, 0.0001)
    made.report(2, 0, link(2e9, 0.0002))
    assert cost(made, 2, 0) == (1 / 2e9, 0.0002)
    assert cost(made, 0, 2) == (1 / 4e9, 0.0001)


def test_matrices_are_of_sources_by_readers():
    made = topology("a", "b", "c")
    made.report(2, 0, link(1e6))
    seconds, latency = made.costs(np.array([1, 2]), np.array([0, 1, 2]))
    assert seconds.shape == latency.shape == (3, 2)
    assert seconds[0].tolist() == pytest.approx([1e-9, 1e-6])


@pytest.mark.parametrize(
    ("report", "is_near"),
    [
        (link(transport="mapped"), True),
        (link(transport="shm", lane="mapped memory"), True),
        (link(lane="cuda_ipc"), True),
        (link(lane="cma"), True),
        (link(lane="rdma"), False),
        (link(transport="socket", lane="tcp"), False),
    ],
)
def test_workers_that_read_each_others_memory_are_of_one_host(report, is_near):
    made = topology("a", "b", "c")
    assert is_one_host(report) == is_near
    made.report(0, 1, report)
    assert made.is_near(0, 1) == is_near and not made.is_near(0, 2)
    assert cost(made, 1, 0)[0] == (1 / 5e9 if is_near else 1e-9)
    # Whoever comes up on a host of theirs belongs to them.
    made.join(3, "b")
    assert made.is_near(3, 0) == is_near


def test_link_that_a_reader_does_not_have_is_the_last_choice():
    made = topology("a", "b")
    made.report(0, 1, link(transport="", reason="refused"))
    assert cost(made, 0, 1)[1] > NO_LINK_S and cost(made, 1, 0)[1] < NO_LINK_S
    assert np.isfinite(cost(made, 0, 1)).all()
    made.report(0, 1, link(transport=""))
    assert cost(made, 0, 1)[1] < NO_LINK_S


def test_wandering_measurements_do_not_change_anything():
    made = topology("a", "b")
    made.report(0, 1, link(1e9, 0.001))
    version = made.version
    for rate in (1.05e9, 0.95e9, 1.02e9):
        made.report(0, 1, link(rate, 0.00101))
    assert made.version == version
    made.report(0, 1, link(2e9, 0.001))
    assert made.version > version


def test_row_of_another_worker_knows_nothing_of_the_old_one():
    made = topology("a", "b")
    made.report(0, 1, link(7e9))
    made.report(1, 0, link(transport="", reason="refused"))
    made.leave(1)
    made.join(1, "c")
    assert cost(made, 0, 1) == (1e-9, 0.001) == cost(made, 1, 0)


def test_grown_matrices_keep_what_was_measured():
    made = topology("a", "b")
    made.report(0, 1, link(7e9, 0.5))
    made.grow(64)
    made.join(60, "a")
    assert cost(made, 0, 1) == (1 / 7e9, 0.5)
    assert made.is_near(60, 0) and not made.is_near(60, 1)


@pytest.mark.parametrize(
    ("address", "host"), [("h:1", "h"), ("10.0.0.1:80", "10.0.0.1"), ("[::1]:5", "[::1]")]
)
def test_host_of_an_address(address, host):
    assert host_of(address) == host
