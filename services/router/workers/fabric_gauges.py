"""Series of how KV comes to each worker, from its fabric reports.

Labels stay bounded: peers are shown while this router knows them, transports and lanes as reported
but cut short, and whatever a worker no longer reports, or a worker that leaves, takes its series
along.
"""

from __future__ import annotations

from typing import NamedTuple

from baton.core import metrics as series
from baton.core.fabric import FabricCounters, FabricReport, LinkReport
from baton.core.metrics import Series
from baton.core.worker_info import Epoch, WorkerId
from baton.telemetry.metrics import Metrics
from services.router.workers.cluster_view import ClusterView, WorkerState

MAX_LABEL_LENGTH = 32
NO_TRANSPORT = "none"
_COUNTERS: tuple[tuple[Series, str], ...] = (
    (series.KV_READS, "reads"),
    (series.KV_READ_BYTES, "read_bytes"),
    (series.KV_FAILED_READS, "failed_reads"),
    (series.KV_EXPIRED_LEASES, "expired_leases"),
    (series.KV_RECYCLES, "recycles"),
    (series.KV_REFUSED_PEERS, "refused_peers"),
    (series.KV_FETCHED_BLOCKS, "fetched_blocks"),
    (series.KV_SAVED_BLOCKS, "saved_blocks"),
    (series.KV_RESTORED_BLOCKS, "restored_blocks"),
    (series.KV_CORRUPT_BLOCKS, "corrupt_blocks"),
    (series.KV_TAKEOVERS, "takeovers"),
    (series.KV_FAILED_TAKEOVERS, "failed_takeovers"),
    (series.KV_TAKEOVER_PAUSE, "takeover_pause_seconds"),
)


class _Sample(NamedTuple):
    family: Series
    labels: tuple[str, ...]


class FabricGauges:
    """Remembers what it has shown."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._shown: set[_Sample] = set()
        self._counted: dict[tuple[str, str], tuple[Epoch, FabricCounters]] = {}
        """Last values of a worker's own counters, which restart with its epoch."""

    def update(self, view: ClusterView) -> None:
        live = [w for w in view.workers if not w.is_quarantined and w.fabric is not None]
        known = {w.info.worker_id for w in view.workers if not w.is_quarantined}
        gauges: dict[_Sample, float] = {}
        counters: set[tuple[str, str]] = set()
        for worker in live:
            labels = (worker.info.role.value, str(worker.info.worker_id))
            counters.add(labels)
            assert worker.fabric is not None
            _collect(worker.fabric, labels, known, gauges)
            self._count(worker, worker.fabric.counters, labels)
        for sample in self._shown - gauges.keys():
            self._metrics.remove(sample.family, *sample.labels)
        for sample, value in gauges.items():
            self._metrics.set(sample.family, value, *sample.labels)
        self._shown = set(gauges)
        for gone in self._counted.keys() - counters:
            del self._counted[gone]
            for family, _ in _COUNTERS:
                self._metrics.remove(family, *gone)

    def _count(
        self, worker: WorkerState, counters: FabricCounters, labels: tuple[str, str]
    ) -> None:
        # A process that has changed its role goes on with its own counters.
        elsewhere = (worker.info.role.other.value, labels[1])
        other = self._counted.get(elsewhere, (worker.info.epoch, FabricCounters()))
        epoch, last = self._counted.get(labels, other)
        if epoch != worker.info.epoch:
            last = FabricCounters()
        for family, name in _COUNTERS:
            increase = max(0, _value(counters, name) - _value(last, name))
            self._metrics.add(family, increase, *labels)
        self._counted[labels] = (worker.info.epoch, counters)


def _value(counters: FabricCounters, name: str) -> float:
    value = getattr(counters, name)
    assert isinstance(value, (int, float)), name
    return value


def _collect(
    report: FabricReport,
    labels: tuple[str, str],
    known: set[WorkerId],
    gauges: dict[_Sample, float],
) -> None:
    """Add the gauges of one worker."""
    for link in report.links:
        if link.peer_id in known:
            peer = (*labels, str(link.peer_id))
            gauges[_Sample(series.LINK_INFO, (*peer, *_kind(link)))] = 1.0
            if link.transport:
                gauges[_Sample(series.LINK_RATE, peer)] = link.bytes_per_second
                gauges[_Sample(series.LINK_LATENCY, peer)] = link.latency_s
    for tier in report.tiers:
        at = (*labels, tier.tier.value)
        gauges[_Sample(series.TIER_BLOCKS, at)] = tier.num_blocks
        gauges[_Sample(series.TIER_BYTES, at)] = tier.num_bytes
        gauges[_Sample(series.TIER_MAX_BYTES, at)] = tier.max_bytes


def _kind(link: LinkReport) -> tuple[str, str]:
    transport = link.transport or NO_TRANSPORT
    return transport[:MAX_LABEL_LENGTH], link.lane[:MAX_LABEL_LENGTH]
