"""One request as bars."""

from __future__ import annotations

from types import SimpleNamespace

from baton.core.errors import WorkerLost
from baton.core.lifecycle import EngineUse, Timeline, TransferStats
from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.request import FinishReason, RequestId
from baton.core.worker_info import Role, WorkerId
from services.router.requests.request_record import RequestRecord, WorkerPart
from services.router.ui.waterfall import brief, waterfall


def whole_record() -> RequestRecord:
    record = RequestRecord(RequestId("r"), "m", 90)
    record.timeline = Timeline(
        {Event.ARRIVED: 100.0, Event.PLACED: 100.1, Event.FIRST_TOKEN: 100.6}
    )
    prefill = {
        Event.PREFILL_QUEUED: 100.2,
        Event.PREFILL_STARTED: 100.3,
        Event.PREFILL_ENDED: 100.5,
    }
    decode = {
        Event.TRANSFER_STARTED: 100.25, Event.TRANSFER_ENDED: 100.55,
        Event.DECODE_STARTED: 100.6, Event.DECODE_ENDED: 101.0,
    }  # fmt: skip
    stats = TransferStats(4096, 2, 1, 0.3, 0.05)
    record.parts = [
        WorkerPart(WorkerId("p0"), Role.PREFILL, True, Timeline(prefill), 100.6),
        WorkerPart(
            WorkerId("d0"), Role.DECODE, False, Timeline(decode, stats, EngineUse(0.2, 9)), 101.0
        ),
    ]
    record.placements = [
        SimpleNamespace(prefill="p0", decode="d0", workers=("p0", "d0"), reason="lowest cost")
    ]
    record.num_cached_tokens, record.num_output_tokens, record.last_token_at_s = 16, 9, 101.0
    record.finish_reason = FinishReason.LENGTH
    return record


def test_bars_are_in_order_and_name_their_worker():
    shown = waterfall(whole_record(), is_running=False, now_s=500.0)
    assert [(r.name, r.place, r.role) for r in shown.rows] == [
        ("queue in router", "router", ""),
        ("prefill queue", "p0", "prefill"),
        ("kv transfer", "d0", "decode"),
        ("prefill", "p0", "prefill"),
        ("decode", "d0", "decode"),
    ]
    assert (shown.rows[3].start_ms, shown.rows[3].end_ms) == (300.0, 500.0)
    assert shown.rows[2].detail["kv_bytes"] == 4096
    assert shown.rows[4].detail["engine_steps"] == 9
    assert (shown.first_token_ms, shown.placement, shown.error) == (600.0, "lowest cost", "")


def test_line_of_the_list_has_lengths_times_and_workers():
    line = brief(whole_record(), is_running=False, now_s=500.0)
    assert (line.prompt_tokens, line.cached_tokens, line.output_tokens) == (90, 16, 9)
    assert (line.state, line.ttft_ms, line.itl_ms, line.total_ms) == ("length", 600.0, 50.0, 1000.0)
    assert line.workers == ["p0", "d0"]


def test_a_running_request_shows_what_is_known():
    record = RequestRecord(RequestId("r"), "m", 3)
    record.timeline.record(Event.ARRIVED, 100.0)
    shown = waterfall(record, is_running=True, now_s=100.25)
    assert shown.rows == [] and shown.first_token_ms is None
    assert (shown.request.state, shown.request.total_ms) == ("waiting", 250.0)
    record.placements = whole_record().placements
    assert brief(record, is_running=True, now_s=101.0).state == "running"


def test_failures_moves_and_errors_are_told():
    record = whole_record()
    record.finish_reason, record.error = None, WorkerLost("d0 is gone")
    record.failures = ["p1: no answer"]
    record.migrations = [
        SimpleNamespace(
            source="d0", target="d1", trigger=SimpleNamespace(value="drain"),
            state=SimpleNamespace(value="failed"), failure="no room", has_moved=False,
        )
    ]  # fmt: skip
    shown = waterfall(record, is_running=False, now_s=102.0)
    assert shown.error == "WorkerLost: d0 is gone" and shown.failures == ["p1: no answer"]
    assert shown.moves == ["d0 to d1 (drain): failed, no room"]
    assert shown.request.state == "error"
