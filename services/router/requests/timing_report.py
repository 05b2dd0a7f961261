"""A client's time line of a request, from its record. Pure."""

from __future__ import annotations

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.lifecycle import Timeline, TransferStats
from baton.core.worker_info import WorkerId
from services.router.requests.request_record import RequestRecord, WorkerPart
from services.router.requests.timing import (
    DecodeTiming,
    PrefillTiming,
    RequestTiming,
    TransferTiming,
)


def timing_of(record: RequestRecord) -> RequestTiming:
    """Of a request whose last token has arrived."""
    timeline = record.timeline
    arrived_at_s = timeline.points.get(Event.ARRIVED)
    total_s = None
    if arrived_at_s is not None and record.num_output_tokens:
        total_s = max(0.0, record.last_token_at_s - arrived_at_s)
    return RequestTiming(
        placed_ms=_ms(timeline.seconds(Event.ARRIVED, Event.PLACED)),
        ttft_ms=_ms(timeline.seconds(Event.ARRIVED, Event.FIRST_TOKEN)),
        total_ms=_ms(total_s),
        mean_itl_ms=_ms(record.mean_itl_s),
        prefill=_prefill(record),
        transfer=_transfer(timeline.transfer),
        decode=_decode(record),
        num_failures=len(record.failures),
        num_moves=sum(move.has_moved for move in record.migrations),
    )


def _prefill(record: RequestRecord) -> PrefillTiming | None:
    if not record.placements:
        return None
    worker_id = record.placements[-1].computes_prompt
    part = _part_of(record, worker_id, computes_prompt=True)
    timeline = Timeline() if part is None else part.timeline
    has_only_computed = part is not None and Event.DECODE_STARTED not in timeline.points
    return PrefillTiming(
        worker=worker_id,
        queue_ms=_ms(timeline.seconds(Event.PREFILL_QUEUED, Event.PREFILL_STARTED)),
        compute_ms=_ms(timeline.seconds(Event.PREFILL_STARTED, Event.PREFILL_ENDED)),
        num_chunks=timeline.engine.num_steps if has_only_computed else None,
        engine_ms=_ms(timeline.engine.seconds) if has_only_computed else None,
        cached_tokens=record.num_cached_tokens or 0,
    )


def _transfer(stats: TransferStats) -> TransferTiming | None:
    if not stats.num_reads:
        return None
    return TransferTiming(
        ms=round(stats.seconds * 1e3, 3),
        exposed_ms=round(stats.exposed_seconds * 1e3, 3),
        num_bytes=stats.num_bytes,
        num_reads=stats.num_reads,
    )


def _decode(record: RequestRecord) -> DecodeTiming | None:
    if not record.placements:
        return None
    moves = [move for move in record.migrations if move.has_moved]
    placement = record.placements[-1]
    worker_id = moves[-1].target if moves else placement.decode
    if worker_id is None:
        return None
    part = _part_of(record, worker_id)
    engine = None if part is None else part.timeline.engine
    return DecodeTiming(
        worker=worker_id,
        decode_ms=_ms(record.timeline.seconds(Event.DECODE_STARTED, Event.DECODE_ENDED)),
        num_steps=None if engine is None else engine.num_steps,
        engine_ms=None if engine is None else _ms(engine.seconds),
    )


def _part_of(
    record: RequestRecord, worker_id: WorkerId, *, computes_prompt: bool = False
) -> WorkerPart | None:
    """The last thing that the worker has told."""
    for part in reversed(record.parts):
        if part.worker_id == worker_id and (part.computes_prompt or not computes_prompt):
            return part
    return None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
