from __future__ import annotations

import asyncio
import dataclasses

from baton.core.fabric import FabricCounters, FabricReport, LinkReport, TierName, TierReport
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import LoadReport, Role, WorkerInfo
from baton.telemetry.metrics import Metrics
from services.router.workers.cluster_view import ClusterView, WorkerState
from services.router.workers.fabric_gauges import FabricGauges

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")


def worker(name, fabric=None, *, epoch="1", lost=False):
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    info = WorkerInfo(name, epoch, role, f"h:{name}", "m", LAYOUT, 10, 64, 4, "fake", 1)
    return WorkerState(info, LoadReport(), is_quarantined=lost, fabric=fabric)


def link(peer="p0", transport="nixl", lane="cma", **kw):
    return LinkReport(
        peer, "1", transport, lane, **{"bytes_per_second": 2e9, "latency_s": 1e-4, **kw}
    )


class Shown:
    """The text after each update."""

    def __init__(self):
        self.metrics = Metrics()
        self.gauges = FabricGauges(self.metrics)

    def __call__(self, *workers):
        self.gauges.update(ClusterView(workers))
        lines = self.metrics.render().decode().splitlines()
        return [line for line in lines if line.startswith("baton_kv_") and "{" in line]


def test_links_tiers_and_counters_are_shown():
    tier = TierReport(TierName.HOST, 3, 300, 1000)
    counters = FabricCounters(reads=7, read_bytes=9, takeovers=2, takeover_pause_seconds=0.5)
    shown = Shown()(worker("p0"), worker("d0", FabricReport((link(),), (tier,), counters)))
    at = 'role="decode",'
    for sample in (
        f'baton_kv_link_info{{lane="cma",peer="p0",{at}transport="nixl",worker="d0"}} 1.0',
        f'baton_kv_link_bytes_per_second{{peer="p0",{at}worker="d0"}} 2000000000.0',
        f'baton_kv_link_latency_seconds{{peer="p0",{at}worker="d0"}} 0.0001',
        f'baton_kv_tier_blocks{{{at}tier="host",worker="d0"}} 3.0',
        f'baton_kv_tier_bytes{{{at}tier="host",worker="d0"}} 300.0',
        f'baton_kv_tier_max_bytes{{{at}tier="host",worker="d0"}} 1000.0',
        f'baton_kv_reads_total{{{at}worker="d0"}} 7.0',
        f'baton_kv_read_bytes_total{{{at}worker="d0"}} 9.0',
        f'baton_kv_failed_reads_total{{{at}worker="d0"}} 0.0',
        f'baton_kv_takeovers_total{{{at}worker="d0"}} 2.0',
        f'baton_kv_takeover_pause_seconds_total{{{at}worker="d0"}} 0.5',
    ):
        assert sample in shown, sample


def test_every_counter_of_the_report_has_a_series():
    values = {f.name: n + 1 for n, f in enumerate(dataclasses.fields(FabricCounters))}
    shown = Shown()(worker("d0", FabricReport(counters=FabricCounters(**values))))
    totals = [float(line.split()[-1]) for line in shown if "_total{" in line]
    assert sorted(totals) == sorted(map(float, values.values()))


def test_counters_go_on_when_a_worker_changes_its_role():
    shown = Shown()
    before = worker("d0", FabricReport(counters=FabricCounters(reads=7)))
    shown(before)
    info = dataclasses.replace(before.info, role=Role.PREFILL, role_version=2)
    fabric = FabricReport(counters=FabricCounters(reads=9))
    lines = shown(dataclasses.replace(before, info=info, fabric=fabric))
    assert 'baton_kv_reads_total{role="prefill",worker="d0"} 2.0' in lines
    assert not [line for line in lines if 'role="decode"' in line]


def test_changed_link_leaves_nothing_of_the_old_one():
    shown = Shown()
    shown(worker("p0"), worker("d0", FabricReport((link(),))))
    lines = shown(worker("p0"), worker("d0", FabricReport((link(transport="socket", lane="tcp"),))))
    (info,) = [line for line in lines if "link_info" in line]
    assert 'transport="socket"' in info and 'lane="tcp"' in info


def test_missing_link_shows_as_none_without_figures():
    lines = Shown()(worker("p0"), worker("d0", FabricReport((link(transport="", lane=""),))))
    assert [line for line in lines if 'transport="none"' in line]
    assert not [line for line in lines if "bytes_per_second" in line or "latency" in line]


def test_peer_that_is_gone_takes_its_series_along():
    report = FabricReport((link("p0"), link("p1")))
    shown = Shown()
    assert (
        len([x for x in shown(worker("p0"), worker("p1"), worker("d0", report)) if "link" in x])
        == 6
    )
    lines = shown(worker("p0"), worker("p1", lost=True), worker("d0", report))
    assert 'peer="p1"' not in "".join(lines) and 'peer="p0"' in "".join(lines)


def test_worker_that_is_gone_takes_its_series_along():
    report = FabricReport((link(),), (TierReport(TierName.DISK),), FabricCounters(reads=1))
    shown = Shown()
    assert shown(worker("p0"), worker("d0", report))
    assert shown(worker("p0"), worker("d0", report, lost=True)) == []
    assert shown(worker("p0")) == []


def test_counters_follow_increases_and_survive_a_restart_of_the_worker():
    shown = Shown()

    def reads(count, epoch):
        report = FabricReport(counters=FabricCounters(reads=count))
        lines = shown(worker("d0", report, epoch=epoch))
        return float(next(x for x in lines if x.startswith("baton_kv_reads_total")).split()[-1])

    assert [reads(5, "1"), reads(5, "1"), reads(8, "1")] == [5, 5, 8]
    assert [reads(2, "2"), reads(3, "2")] == [10, 11]
    assert reads(1, "2") == 11, "a counter never falls"


def test_long_labels_are_cut_short():
    lines = Shown()(worker("p0"), worker("d0", FabricReport((link(lane="x" * 500),))))
    assert max(map(len, lines)) < 300


async def test_reports_come_over_the_session_and_end_with_it(cluster):
    report = FabricReport((link("p0"),), counters=FabricCounters(reads=4))
    cluster["d0"].report_fabric(report)
    await cluster.rendered('peer="p0"', 'baton_kv_reads_total{role="decode",worker="d0"} 4.0')
    assert cluster.core.pool.session("d0").fabric == report
    await cluster["d0"].kill()
    await cluster.connected("p0")
    async with asyncio.timeout(3):
        while 'worker="d0"' in cluster.core.metrics.render().decode():
            await asyncio.sleep(0.02)
    await cluster["d0"].revive()
    await cluster.connected()
    assert cluster.core.pool.session("d0").fabric is None


async def test_fabric_reports_are_signs_of_life(cluster):
    session = cluster.core.pool.session("d0")
    cluster["d0"].faults.write_delay_s = 0.0
    before_s = session.last_message_at_s
    cluster["d0"].report_fabric(FabricReport())
    async with asyncio.timeout(2):
        while session.fabric is None:
            await asyncio.sleep(0.005)
    assert session.last_message_at_s > before_s
