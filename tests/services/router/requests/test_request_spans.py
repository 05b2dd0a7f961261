"""Spans of a request, from what the workers' clocks say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import ConfigError, WorkerLost
from baton.core.lifecycle import EngineUse, Timeline, TransferStats
from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.request import FinishReason, RequestId
from baton.core.trace import TraceContext
from baton.core.worker_info import Role, WorkerId
from baton.telemetry.metrics import Metrics
from baton.telemetry.spans import Span, SpanCounts
from services.router.requests.request_record import RequestRecord, WorkerPart
from services.router.requests.request_spans import clock_shift_s, spans_of
from services.router.requests.tracer import Tracer, open_tracer
from services.router.telemetry_config import OtlpProtocol, TracingConfig

PARENT = TraceContext(0xABC, 0xDEF, True, "vendor=1")
PREFILL_POINTS = {
    Event.PREFILL_QUEUED: 100.2, Event.PREFILL_STARTED: 100.3, Event.PREFILL_ENDED: 100.6,
}  # fmt: skip
DECODE_POINTS = {
    Event.DECODE_RESERVED: 100.25, Event.TRANSFER_STARTED: 100.4, Event.TRANSFER_ENDED: 100.65,
    Event.DECODE_STARTED: 100.7, Event.DECODE_ENDED: 101.5,
}  # fmt: skip


def make_record(*, decode_clock_s: float = 0.0) -> RequestRecord:
    """`decode_clock_s`: by how much the decode worker's clock is ahead."""
    record = RequestRecord(RequestId("r"), "m", 90, trace=PARENT)
    record.timeline = Timeline(
        {Event.ARRIVED: 100.0, Event.PLACED: 100.1, Event.FIRST_TOKEN: 100.61}
    )
    decode_points = {e: at_s + decode_clock_s for e, at_s in DECODE_POINTS.items()}
    record.parts = [
        WorkerPart(WorkerId("p0"), Role.PREFILL, True, Timeline(PREFILL_POINTS), 100.61),
        WorkerPart(
            WorkerId("d0"),
            Role.DECODE,
            False,
            # A reader takes over what the owner told it.
            Timeline(PREFILL_POINTS | decode_points, TransferStats(64, 2, 1, 0.2, 0.05),
                     EngineUse(0.4, 11)),
            101.51,
        ),
    ]  # fmt: skip
    record.num_output_tokens, record.last_token_at_s = 12, 101.51
    record.finish_reason = FinishReason.LENGTH
    return record


def spans(record: RequestRecord) -> dict[str, Span]:
    made = spans_of(record, PARENT, random.Random(1), router_id="r0", now_s=200.0)
    assert len({s.span_id for s in made}) == len(made)
    assert len({s.name for s in made}) == len(made)
    return {s.name: s for s in made}


def test_each_stage_is_a_span_of_the_process_that_did_it():
    found = spans(make_record())
    assert {n: (s.service, s.instance) for n, s in found.items()} == {
        "request": ("baton-router", "r0"),
        "queue in router": ("baton-router", "r0"),
        "prefill queue": ("baton-prefill", "p0"),
        "prefill": ("baton-prefill", "p0"),
        "kv transfer": ("baton-decode", "d0"),
        "decode": ("baton-decode", "d0"),
    }
    root = found["request"]
    assert (root.trace_id, root.parent_id) == (0xABC, 0xDEF)
    assert (root.start_s, root.end_s) == (100.0, 101.51)
    assert {s.parent_id for n, s in found.items() if n != "request"} == {root.span_id}
    assert (found["prefill"].start_s, found["prefill"].end_s) == (100.3, 100.6)
    assert (found["kv transfer"].start_s, found["kv transfer"].end_s) == (100.4, 100.65)
    assert found["kv transfer"].attributes["baton.kv_bytes"] == 64
    assert found["decode"].attributes["baton.engine_seconds"] == 0.4
    assert all(s.trace_state == "vendor=1" for s in found.values())


@pytest.mark.parametrize("ahead_s", [-3600.0, -0.5, 0.5, 3600.0])
def test_worker_with_a_wrong_clock_is_shown_within_its_request(ahead_s):
    found = spans(make_record(decode_clock_s=ahead_s))
    decode, transfer, root = found["decode"], found["kv transfer"], found["request"]
    assert root.start_s < transfer.start_s < transfer.end_s < decode.start_s
    assert decode.end_s <= root.end_s + 1e-6
    assert decode.end_s - decode.start_s == pytest.approx(0.8)
    assert transfer.end_s - transfer.start_s == pytest.approx(0.25)


def test_right_clock_is_believed():
    assert clock_shift_s(100.1, 101.6, 100.2, 101.5) == 0.0


@given(
    earliest=st.floats(0, 1e3), window=st.floats(0, 1e3), first=st.floats(0, 1e3),
    length=st.floats(0, 1e3),
)  # fmt: skip
def test_shifted_points_lie_in_the_window_if_they_fit(earliest, window, first, length):
    shift_s = clock_shift_s(earliest, earliest + window, first, first + length)
    assert first + shift_s >= earliest - 1e-6
    if length <= window:
        assert first + length + shift_s <= earliest + window + 1e-6
    else:
        assert first + shift_s == pytest.approx(earliest, abs=1e-6)


def test_failed_request_says_why_and_ends_now():
    record = make_record()
    record.finish_reason, record.error = FinishReason.ERROR, WorkerLost("gone" * 1000)
    record.parts = []
    root = spans(record)["request"]
    assert root.error.startswith("WorkerLost: gone") and len(root.error) == 500
    assert root.end_s == 200.0


def test_request_that_was_never_placed_is_one_span():
    record = RequestRecord(RequestId("r"), "m", 90)
    record.timeline = Timeline({Event.ARRIVED: 100.0})
    assert list(spans(record)) == ["request"]


class Kept:
    """A queue that keeps everything."""

    counts = SpanCounts()

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, spans: list[Span]) -> None:
        self.spans += spans


def make_tracer(sample_ratio: float) -> tuple[Tracer, Kept]:
    kept = Kept()
    tracer = Tracer(
        kept, Metrics(), router_id="r0", sample_ratio=sample_ratio, rng=random.Random(7)
    )
    return tracer, kept


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("is_sampled", [True, False])
def test_decision_of_the_client_is_obeyed(ratio, is_sampled):
    tracer, kept = make_tracer(ratio)
    record = make_record()
    record.trace = TraceContext(1, 2, is_sampled)
    tracer.ended(record)
    assert bool(kept.spans) is is_sampled


def test_share_of_the_others_is_traced_each_in_a_trace_of_its_own():
    tracer, kept = make_tracer(0.25)
    record = make_record()
    record.trace = None
    for _ in range(400):
        tracer.ended(record)
    roots = [s for s in kept.spans if s.name == "request"]
    assert 60 < len(roots) < 140
    assert len({s.trace_id for s in roots}) == len(roots)
    assert all(s.parent_id == 0 for s in roots)


async def test_tracing_is_off_by_default_and_imports_nothing():
    tracer = open_tracer(TracingConfig(), "r0", Metrics())
    tracer.ended(make_record())
    tracer.update()
    await tracer.stop()


@pytest.mark.parametrize("protocol", list(OtlpProtocol))
async def test_missing_packages_are_named(monkeypatch, protocol):
    import sys

    for name in list(sys.modules):
        if name.startswith(("opentelemetry.exporter.otlp", "baton.telemetry.otlp")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto", None)
    config = TracingConfig(otlp_endpoint="http://127.0.0.1:4317", protocol=protocol)
    with pytest.raises(ConfigError, match=r"tracing.otlp_endpoint is set.*extra `tracing`"):
        open_tracer(config, "r0", Metrics())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"otlp_endpoint": "collector:4317"}, "URL such as"),
        ({"otlp_endpoint": "ftp://collector"}, "URL such as"),
        ({"otlp_endpoint": "http://"}, "URL such as"),
        ({"otlp_endpoint": "http://c:99999"}, "URL such as"),
        ({"otlp_endpoint": ""}, "URL such as"),
        ({"otlp_endpoint": "http://me:secret@c:4317"}, "^[^:]*holds a user or password"),
        ({"sample_ratio": 1.5}, "between 0 and 1, got 1.5"),
        ({"sample_ratio": float("nan")}, "between 0 and 1"),
        ({"max_pending_spans": 0}, "max_pending_spans must be positive"),
        ({"timeout_s": -1.0}, "timeout_s must be positive"),
    ],
)
def test_wrong_setting_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TracingConfig(**settings)
