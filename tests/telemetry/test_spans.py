"""Spans on their way to a collector: real exporters, a real collector on the loopback."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from baton.telemetry.otlp import OtlpExporter
from baton.telemetry.spans import Span, SpanCounts, SpanQueue
from running_system import free_port
from trace_collector import grpc_collector, http_collector

TRACE = 0x4BF92F3577B34DA6A3CE929D0E0E4736
SPAN = Span(
    "prefill", TRACE, 7, 5, 10.25, 11.5, "baton-prefill", "p0",
    attributes={"baton.engine_steps": 3, "reasons": ("stop",)}, trace_state="vendor=1",
)  # fmt: skip
ROOT = Span(
    "request", TRACE, 5, 3, 10.0, 12.0, "baton-router", "r0", error="WorkerLost: gone",
    is_server=True,
)  # fmt: skip


class HeldExporter:
    """Takes nothing before it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.has_begun = threading.Event()
        self.taken: list[Span] = []
        self.is_closed = False

    def export(self, spans: Sequence[Span]) -> bool:
        self.has_begun.set()
        self.let_go.wait(10)
        self.taken += spans
        return True

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("collector_of", "over_http"), [(grpc_collector, False), (http_collector, True)]
)
def test_collector_gets_the_spans_as_they_are(collector_of, over_http):
    with collector_of() as collector:
        exporter = OtlpExporter(collector.endpoint, over_http=over_http, timeout_s=5)
        assert exporter.export([ROOT, SPAN])
        exporter.close()
    root, child = collector.spans
    assert (root.service, root.instance) == ("baton-router", "r0")
    assert root.span.status.message == "WorkerLost: gone" and root.span.kind == 2
    assert (child.service, child.instance, child.name) == ("baton-prefill", "p0", "prefill")
    assert child.trace_id == root.trace_id == f"{TRACE:032x}"
    assert child.span.parent_span_id == root.span.span_id == (5).to_bytes(8)
    assert child.span.end_time_unix_nano - child.span.start_time_unix_nano == 1_250_000_000
    assert child.attributes["baton.engine_steps"] == 3 and child.span.trace_state == "vendor=1"


@pytest.mark.parametrize(
    ("collector_of", "over_http"), [(grpc_collector, False), (http_collector, True)]
)
def test_collector_that_refuses_or_is_away_costs_the_spans_alone(collector_of, over_http):
    with collector_of() as collector:
        collector.is_refusing = True
        exporter = OtlpExporter(collector.endpoint, over_http=over_http, timeout_s=1)
        assert not exporter.export([SPAN])
        exporter.close()
    away = f"http://127.0.0.1:{free_port()}"
    exporter = OtlpExporter(away, over_http=over_http, timeout_s=0.5)
    assert not exporter.export([SPAN])
    exporter.close()


@pytest.mark.parametrize("over_http", [False, True])
def test_collector_that_is_away_is_news_once(over_http, caplog):
    away = f"http://127.0.0.1:{free_port()}"
    exporter = OtlpExporter(away, over_http=over_http, timeout_s=0.2)
    for _ in range(3):
        assert not exporter.export([SPAN])
    # The library leaves out some of what it said a moment ago, too.
    assert len(caplog.records) <= 1
    exporter.close()


def test_own_path_of_an_http_collector_is_kept():
    with http_collector() as collector:
        exporter = OtlpExporter(f"{collector.endpoint}/else", over_http=True, timeout_s=1)
        assert not exporter.export([SPAN])
        exporter.close()
        exporter = OtlpExporter(f"{collector.endpoint}/", over_http=True, timeout_s=1)
        assert exporter.export([SPAN])
        exporter.close()


def test_queue_drops_and_counts_what_does_not_fit_and_never_blocks():
    exporter = HeldExporter()
    queue = SpanQueue(exporter, max_pending=4)
    queue.add([SPAN])
    assert exporter.has_begun.wait(5)
    for _ in range(3):
        queue.add([SPAN, SPAN])
    assert queue.counts == SpanCounts(exported=0, dropped=2, failed=0)
    exporter.let_go.set()
    queue.stop(5)
    assert queue.counts == SpanCounts(exported=5, dropped=2, failed=0)
    assert len(exporter.taken) == 5 and exporter.is_closed


def test_stop_sends_what_is_pending_and_takes_nothing_more():
    exporter = HeldExporter()
    exporter.let_go.set()
    queue = SpanQueue(exporter, max_pending=100)
    queue.add([SPAN] * 10)
    queue.stop(5)
    queue.add([SPAN])
    assert queue.counts == SpanCounts(exported=10, dropped=1, failed=0)


def test_stop_does_not_wait_for_a_collector_that_hangs():
    exporter = HeldExporter()
    queue = SpanQueue(exporter, max_pending=100)
    queue.add([SPAN])
    assert exporter.has_begun.wait(5)
    queue.add([SPAN, SPAN])
    queue.stop(0.05)
    assert queue.counts.dropped == 2
    exporter.let_go.set()


def test_exporter_that_raises_costs_the_batch_alone():
    class Broken(HeldExporter):
        def export(self, spans: Sequence[Span]) -> bool:
            raise OSError("no route")

    queue = SpanQueue(Broken(), max_pending=100)
    queue.add([SPAN, SPAN])
    queue.stop(5)
    assert queue.counts == SpanCounts(failed=2)
