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


def test_counters_go_on_when_a_worker_changes_its_role() -> None:
    metrics = Metrics()
    gauges = WorkerGauges(metrics)
    moved = dataclasses.replace(INFO, role=Role.PREFILL, role_version=2)
    gauges.update(ClusterView((state(num_preemptions=3),)))
    gauges.update(ClusterView((WorkerState(moved, LoadReport(num_preemptions=5)),)))
    text = metrics.render().decode()
    assert 'baton_worker_preemptions_total{role="prefill",worker="d0"} 2.0' in text
    assert 'role="decode",worker="d0"' not in text
    gauges.update(ClusterView((state(num_preemptions=6),)))
    text = metrics.render().decode()
    assert f"{PREEMPTIONS} 1.0" in text and 'role="prefill",worker="d0"' not in text


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


def test_time_in_steps_counts_on_over_restarts_and_blocks_are_told_by_state() -> None:
    metrics = Metrics()
    gauges = WorkerGauges(metrics)
    for epoch, busy_s in (("1", 2.0), ("1", 3.5), ("2", 0.5)):
        load = LoadReport(busy_seconds=busy_s, num_steps=4, total_blocks=8, free_blocks=5,
                          cached_blocks=1)  # fmt: skip
        gauges.update(ClusterView((dataclasses.replace(state(epoch=epoch), load=load),)))
    text = metrics.render().decode()
    assert 'baton_worker_busy_seconds_total{role="decode",worker="d0"} 4.0' in text
    assert 'baton_worker_steps_total{role="decode",worker="d0"} 8.0' in text
    for name, count in (("free", 5), ("cached", 1), ("held", 2)):
        sample = f'baton_worker_kv_blocks{{role="decode",state="{name}",worker="d0"}} {count}.0'
        assert sample in text


def test_worker_that_comes_back_as_another_has_one_info_series() -> None:
    metrics = Metrics()
    gauges = WorkerGauges(metrics)
    for num_blocks in (8, 16):
        info = dataclasses.replace(INFO, num_blocks=num_blocks, epoch=Epoch(str(num_blocks)))
        gauges.update(ClusterView((dataclasses.replace(state(), info=info),)))
    lines = [
        line
        for line in metrics.render().decode().splitlines()
        if line.startswith("baton_worker_info{")
    ]
    assert len(lines) == 1 and 'num_blocks="16"' in lines[0] and 'model="m"' in lines[0]
    assert f'fingerprint="{LAYOUT.fingerprint}"' in lines[0]
