"""A client's time line, from the record of its request."""

from __future__ import annotations

from baton.core.lifecycle import EngineUse, Timeline, TransferStats
from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.request import RequestId
from baton.core.worker_info import Role, WorkerId
from services.router.placement.placement import Placement, PlacementKind
from services.router.requests.request_record import RequestRecord, WorkerPart
from services.router.requests.timing import DecodeTiming, PrefillTiming, TransferTiming
from services.router.requests.timing_report import timing_of

P0, D0 = WorkerId("p0"), WorkerId("d0")
COMPUTED = {Event.PREFILL_QUEUED: 1.0, Event.PREFILL_STARTED: 1.25, Event.PREFILL_ENDED: 2.0}
DECODED = {Event.DECODE_STARTED: 2.5, Event.DECODE_ENDED: 4.0}


def make_record(kind: PlacementKind, prefill: WorkerId | None, decode: WorkerId) -> RequestRecord:
    record = RequestRecord(RequestId("r"), "m", 90, num_cached_tokens=16)
    record.placements.append(Placement(kind, prefill, decode, 0.0, "test", terms=()))
    record.timeline = Timeline({Event.ARRIVED: 0.5, Event.PLACED: 0.75, Event.FIRST_TOKEN: 2.25})
    record.num_output_tokens, record.last_token_at_s = 5, 4.25
    return record


def test_request_over_both_pools():
    record = make_record(PlacementKind.REMOTE_PREFILL, P0, D0)
    stats = TransferStats(4096, 4, 2, 0.5, 0.125)
    record.parts = [
        WorkerPart(P0, Role.PREFILL, True, Timeline(COMPUTED, engine=EngineUse(0.625, 2)), 2.25),
        WorkerPart(D0, Role.DECODE, False, Timeline(DECODED, stats, EngineUse(0.25, 4)), 4.25),
    ]
    record.timeline.merge(Timeline(COMPUTED))
    record.timeline.merge(Timeline(DECODED, stats))
    timing = timing_of(record)
    assert (timing.placed_ms, timing.ttft_ms, timing.total_ms) == (250.0, 1750.0, 3750.0)
    assert timing.mean_itl_ms == 500.0
    assert timing.prefill == PrefillTiming(P0, 250.0, 750.0, 2, 625.0, 16)
    assert timing.transfer == TransferTiming(500.0, 125.0, 4096, 2)
    assert timing.decode == DecodeTiming(D0, 1500.0, 4, 250.0)
    assert (timing.num_failures, timing.num_moves) == (0, 0)


def test_worker_that_did_it_all_tells_its_engine_time_once():
    record = make_record(PlacementKind.LOCAL_PREFILL, None, D0)
    points = COMPUTED | DECODED
    record.parts = [
        WorkerPart(D0, Role.DECODE, True, Timeline(points, engine=EngineUse(0.5, 6)), 4.25)
    ]
    record.timeline.merge(Timeline(points))
    timing = timing_of(record)
    assert timing.prefill == PrefillTiming(D0, 250.0, 750.0, None, None, 16)
    assert timing.decode == DecodeTiming(D0, 1500.0, 6, 500.0)
    assert timing.transfer is None


def test_what_no_worker_has_told_is_missing():
    record = make_record(PlacementKind.REMOTE_PREFILL, P0, D0)
    timing = timing_of(record)
    assert timing.prefill == PrefillTiming(P0, None, None, None, None, 16)
    assert timing.decode == DecodeTiming(D0, None, None, None)


def test_request_without_a_placement_has_no_stages():
    record = RequestRecord(RequestId("r"), "m", 90)
    timing = timing_of(record)
    assert (timing.prefill, timing.decode, timing.total_ms) == (None, None, None)
