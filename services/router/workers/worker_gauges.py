"""Series per worker, set from the view; a worker that leaves takes its series along."""

from __future__ import annotations

from baton.core import metrics as series
from baton.core.worker_info import Epoch, Role
from baton.telemetry.metrics import Metrics
from services.router.workers.cluster_view import ClusterView, WorkerState

Labels = tuple[str, str]
_PER_WORKER = (
    series.WORKER_RUNNING,
    series.WORKER_WAITING,
    series.WORKER_KV_USAGE,
    series.WORKER_LEASES,
    series.WORKER_QUARANTINED,
    series.WORKER_PREEMPTIONS,
)


class WorkerGauges:
    """Remembers which workers have series."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._preemptions: dict[Labels, tuple[Epoch, int]] = {}
        """Last value of a worker's own counter, which restarts with its epoch."""

    def update(self, view: ClusterView) -> None:
        for role in Role:
            self._metrics.set(series.WORKERS, view.num_live(role), role.value)
        live = [w for w in view.workers if not w.is_quarantined]
        labels = {(w.info.role.value, str(w.info.worker_id)) for w in live}
        for gone in self._preemptions.keys() - labels:
            del self._preemptions[gone]
            for family in _PER_WORKER:
                self._metrics.remove(family, *gone)
        for worker in live:
            self._update_worker(worker)

    def _update_worker(self, worker: WorkerState) -> None:
        labels = (worker.info.role.value, str(worker.info.worker_id))
        load, metrics = worker.load, self._metrics
        metrics.set(series.WORKER_RUNNING, load.num_running, *labels)
        metrics.set(series.WORKER_WAITING, load.num_waiting, *labels)
        metrics.set(series.WORKER_KV_USAGE, load.kv_usage, *labels)
        metrics.set(series.WORKER_LEASES, load.leases, *labels)
        metrics.set(series.WORKER_QUARANTINED, load.quarantined_blocks, *labels)
        epoch, last = self._preemptions.get(labels, (worker.info.epoch, 0))
        if epoch != worker.info.epoch:
            last = 0
        metrics.add(series.WORKER_PREEMPTIONS, max(0, load.num_preemptions - last), *labels)
        self._preemptions[labels] = (worker.info.epoch, load.num_preemptions)
