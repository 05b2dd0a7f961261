"""Series per worker, set from the view; a worker that leaves takes its series along."""

from __future__ import annotations

from typing import NamedTuple

from baton.core import metrics as series
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerInfo
from baton.telemetry.metrics import Metrics
from services.router.workers.cluster_view import ClusterView, WorkerState

Labels = tuple[str, str]
_GAUGES = (
    series.WORKER_RUNNING,
    series.WORKER_WAITING,
    series.WORKER_KV_USAGE,
    series.WORKER_LEASES,
    series.WORKER_QUARANTINED,
)
_COUNTERS = (series.WORKER_PREEMPTIONS, series.WORKER_BUSY, series.WORKER_STEPS)
_BLOCK_STATES = ("free", "cached", "held")


class _Counted(NamedTuple):
    """Last values of a worker's own counters, which restart with its epoch."""

    epoch: Epoch
    values: tuple[float, ...]
    """As `_COUNTERS`."""
    info: tuple[str, ...]
    """Label set of its info series; empty before it has one."""


class WorkerGauges:
    """Remembers which workers have series."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counted: dict[Labels, _Counted] = {}

    def update(self, view: ClusterView) -> None:
        for role in Role:
            self._metrics.set(series.WORKERS, view.num_live(role), role.value)
        live = [w for w in view.workers if not w.is_quarantined]
        labels = {(w.info.role.value, str(w.info.worker_id)) for w in live}
        for worker in live:
            self._keep_counting(worker)
        for gone in self._counted.keys() - labels:
            self._remove(gone)
        for worker in live:
            self._update_worker(worker)

    def _keep_counting(self, worker: WorkerState) -> None:
        """A process that has changed its role goes on with its own counters."""
        name, role = str(worker.info.worker_id), worker.info.role
        known = self._counted.get((role.other.value, name))
        if known is not None and known.epoch == worker.info.epoch:
            self._remove((role.other.value, name))
            self._counted.setdefault((role.value, name), known._replace(info=()))

    def _remove(self, labels: Labels) -> None:
        self._metrics.remove(series.WORKER_INFO, *self._counted.pop(labels).info)
        for family in (*_GAUGES, *_COUNTERS):
            self._metrics.remove(family, *labels)
        for state in _BLOCK_STATES:
            self._metrics.remove(series.WORKER_BLOCKS, *labels, state)

    def _update_worker(self, worker: WorkerState) -> None:
        labels = (worker.info.role.value, str(worker.info.worker_id))
        load, metrics = worker.load, self._metrics
        metrics.set(series.WORKER_RUNNING, load.num_running, *labels)
        metrics.set(series.WORKER_WAITING, load.num_waiting, *labels)
        metrics.set(series.WORKER_KV_USAGE, load.kv_usage, *labels)
        metrics.set(series.WORKER_LEASES, load.leases, *labels)
        metrics.set(series.WORKER_QUARANTINED, load.quarantined_blocks, *labels)
        num_held = load.total_blocks - load.free_blocks - load.cached_blocks
        counts = (load.free_blocks, load.cached_blocks, num_held)
        for state, count in zip(_BLOCK_STATES, counts, strict=True):
            metrics.set(series.WORKER_BLOCKS, count, *labels, state)
        self._count(worker, labels)

    def _count(self, worker: WorkerState, labels: Labels) -> None:
        values, info = _counters(worker.load), (*labels, *_info_labels(worker.info))
        known = self._counted.get(labels)
        if known is not None and known.info and known.info != info:
            self._metrics.remove(series.WORKER_INFO, *known.info)
        self._metrics.set(series.WORKER_INFO, 1, *info)
        is_same = known is not None and known.epoch == worker.info.epoch
        last = known.values if known is not None and is_same else (0.0,) * len(values)
        for family, value, before in zip(_COUNTERS, values, last, strict=True):
            self._metrics.add(family, max(0.0, value - before), *labels)
        self._counted[labels] = _Counted(worker.info.epoch, values, info)


def _counters(load: LoadReport) -> tuple[float, ...]:
    return (load.num_preemptions, load.busy_seconds, load.num_steps)


def _info_labels(info: WorkerInfo) -> tuple[str, ...]:
    layout = info.layout
    return (
        info.model_name,
        str(layout.block_size),
        str(info.num_blocks),
        layout.dtype,
        str(info.max_model_len),
        layout.fingerprint,
    )
