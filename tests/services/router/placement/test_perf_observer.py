from __future__ import annotations

import pytest

from baton.core.lifecycle import LifecycleEvent as E
from baton.core.lifecycle import Timeline
from baton.core.worker_info import Role, WorkerId
from baton.telemetry.metrics import Metrics
from services.router.placement.perf_model import PerfModel, Quantity
from services.router.placement.perf_observer import MIN_DECODE_TOKENS, PerfObserver
from tests.support.worker_tables import cluster_of, load_report


class Seen(PerfModel):
    """Writes down what it is told."""

    def __init__(self):
        super().__init__()
        self.told = {}

    def observe_prefill(self, *args):
        self.told["prefill"] = args
        super().observe_prefill(*args)

    def observe_queue(self, *args):
        self.told["queue"] = args
        super().observe_queue(*args)

    def observe_itl(self, *args):
        self.told["itl"] = args
        super().observe_itl(*args)

    def observe_ttft(self, *args):
        self.told["ttft"] = args
        super().observe_ttft(*args)


TIMELINE = Timeline(
    {
        E.PLACED: 100.0, E.FIRST_TOKEN: 100.9, E.PREFILL_QUEUED: 5.0, E.PREFILL_STARTED: 5.25,
        E.PREFILL_ENDED: 5.75, E.DECODE_STARTED: 9.0, E.DECODE_ENDED: 10.0,
    }
)  # fmt: skip


def observe(cluster, placement, num_output=11, timeline=TIMELINE):
    perf, metrics = Seen(), Metrics()
    PerfObserver(perf, cluster.table, metrics).observe(
        placement, timeline, num_prompt_tokens=1000, num_cached_tokens=160,
        num_output_tokens=num_output,
    )  # fmt: skip
    return perf, metrics.render().decode()


def test_finished_request_teaches_what_each_worker_measured():
    cluster = cluster_of("p0", "d0")
    cluster.books["p0"].report(load_report(queued_prefill_tokens=700), 0.0)
    cluster.books["d0"].report(load_report(num_running=3, resident_kv_tokens=3000), 0.0)
    placement = cluster.place(1000, cached={"p0": 10})
    cluster.books["d0"].report(load_report(num_running=7, resident_kv_tokens=5000), 1.0)
    perf, exported = observe(cluster, placement)
    assert perf.told == {
        "prefill": (Role.PREFILL, "p0", 840, 160, 0.5),
        "queue": (Role.PREFILL, "p0", 700, 0.25),
        "itl": (Role.DECODE, "d0", 6.0, pytest.approx(4000 + 1000 + 5.5), pytest.approx(0.1)),
        "ttft": (Role.PREFILL, placement.predicted.ttft_s, pytest.approx(0.9)),
    }
    error = perf.error_ratio(Quantity.PREFILL, Role.PREFILL)
    line = 'baton_perf_model_error_ratio{quantity="prefill",role="prefill"}'
    assert f"{line} {error}" in exported
    assert 'quantity="itl",role="decode"' in exported and 'quantity="ttft"' in exported


def test_request_on_one_worker_teaches_its_role():
    cluster = cluster_of("d0")
    perf, _ = observe(cluster, cluster.place(1000))
    assert perf.told["prefill"][:2] == (Role.DECODE, "d0")
    assert perf.told["itl"][:2] == (Role.DECODE, "d0")


def test_what_was_not_measured_teaches_nothing():
    cluster = cluster_of("p0", "d0")
    placement = cluster.place(1000)
    assert "itl" not in observe(cluster, placement, MIN_DECODE_TOKENS - 1)[0].told
    assert observe(cluster, placement, timeline=Timeline())[0].told == {}
    cluster.table.leave(WorkerId("d0"))
    assert "itl" not in observe(cluster, placement)[0].told
