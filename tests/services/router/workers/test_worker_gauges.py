from __future__ import annotations

import dataclasses

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from baton.telemetry.metrics import Metrics
from services.router.workers.cluster_view import ClusterView, WorkerState
from services.router.workers.worker_gauges import WorkerGauges

LAYOUT = KvLayout("m", 2, 1, 4, 4, "float32")
INFO = WorkerInfo(
    WorkerId("d0"), Epoch("1"), Role.DECODE, "h:1", "m", LAYOUT, 8, 64, 4, "shm", 1
)  # fmt: skip
PREEMPTIONS = 'baton_worker_preemptions_total{role="decode",worker="d0"}'


def state(*, epoch: str = "1", is_quarantined: bool = False, **load: int) -> WorkerState:
    info = dataclasses.replace(INFO, epoch=Epoch(epoch))
    return WorkerState(info, LoadReport(**load), is_quarantined=is_quarantined)


def test_counters_go_on_when_a_worker_starts_anew() -> None:
    metrics = Metrics()
    gauges = WorkerGauges(metrics)
    for epoch, num_preemptions in (("1", 3), ("1", 5), ("2", 1), ("2", 1)):
        gauges.update(ClusterView((state(epoch=epoch, num_preemptions=num_preemptions),)))
    assert f"{PREEMPTIONS} 6.0" in metrics.render().decode()


def test_a_worker_that_is_lost_takes_its_series_along() -> None:
    metrics = Metrics()
    gauges = WorkerGauges(metrics)
    gauges.update(ClusterView((state(num_running=2),)))
    text = metrics.render().decode()
    assert 'baton_worker_requests_running{role="decode",worker="d0"} 2.0' in text
    assert 'baton_workers{role="decode"} 1.0' in text
    gauges.update(ClusterView((state(is_quarantined=True),)))
    text = metrics.render().decode()
    assert 'worker="d0"' not in text and 'baton_workers{role="decode"} 0.0' in text
