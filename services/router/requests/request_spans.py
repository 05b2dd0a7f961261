"""A request's record as spans: router, prefill, transfer, decode.

    request ────────────────────────────────────────────── (the client's span is its parent)
      ├─ queue in router
      ├─ prefill queue ─ prefill
      ├─ kv transfer            one for each worker that read KV
      └─ decode                 one for each worker that generated

Made of the time points that workers report with a request's last delta, so that tracing costs
nothing while tokens flow and workers need no way to a collector.

Workers' clocks may differ from the router's. What a worker did, it did after it was sent the
request and before its report arrived: its points are shifted, all by the same, as little as is
needed for them to lie between the two.

Pure. Does not know: exporters, sampling.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.request import FinishReason
from baton.core.trace import TraceContext
from baton.telemetry.spans import AttributeValue, Span
from services.router.requests.request_record import RequestRecord, WorkerPart

_COMPUTING = (Event.PREFILL_QUEUED, Event.PREFILL_STARTED, Event.PREFILL_ENDED)
_READING = (Event.DECODE_RESERVED, Event.TRANSFER_STARTED, Event.TRANSFER_ENDED)
_GENERATING = (Event.DECODE_STARTED, Event.DECODE_ENDED)
MAX_ERROR_CHARS = 500


def spans_of(
    record: RequestRecord, parent: TraceContext, rng: random.Random, *, router_id: str, now_s: float
) -> list[Span]:
    """Of a request that is over; the first one is the request's own. `parent` with a span id of 0
    has only the trace id."""
    root = _root(record, parent, rng.getrandbits(64) or 1, router_id, now_s)
    points = record.timeline.points
    spans = [root]
    if Event.PLACED in points:
        spans.append(
            _child(root, rng, "queue in router", points[Event.ARRIVED], points[Event.PLACED])
        )
    for part in record.parts:
        spans += _of_part(record, part, root, rng)
    return spans


def clock_shift_s(earliest_s: float, latest_s: float, first_s: float, last_s: float) -> float:
    """By how much a worker's points from `first_s` to `last_s` must move to lie within the
    router's window; as little as possible."""
    lowest_s, highest_s = earliest_s - first_s, latest_s - last_s
    if lowest_s > highest_s:
        # The window is too small: a clock has been set meanwhile. The beginning counts.
        return lowest_s
    return min(max(0.0, lowest_s), highest_s)


def _root(
    record: RequestRecord, parent: TraceContext, span_id: int, router_id: str, now_s: float
) -> Span:
    finish = record.finish_reason or FinishReason.ERROR
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "generate",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": (finish.value,),
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "baton.tenant": record.tenant,
        "baton.cached_tokens": record.num_cached_tokens or 0,
        "baton.failures": len(record.failures),
        "baton.moves": sum(move.has_moved for move in record.migrations),
    }
    ttft_s = record.timeline.seconds(Event.ARRIVED, Event.FIRST_TOKEN)
    if ttft_s is not None:
        attributes["baton.ttft_seconds"] = ttft_s
    error = ""
    if record.error is not None:
        error = f"{type(record.error).__name__}: {record.error}"[:MAX_ERROR_CHARS]
    start_s = record.timeline.points[Event.ARRIVED]
    is_whole = finish in (FinishReason.STOP, FinishReason.LENGTH)
    end_s = record.last_token_at_s if is_whole and record.num_output_tokens else now_s
    return Span(
        "request",
        parent.trace_id,
        span_id,
        parent.span_id,
        start_s,
        max(start_s, end_s),
        service="baton-router",
        instance=router_id,
        attributes=attributes,
        error=error,
        is_server=True,
        trace_state=parent.state,
    )


def _of_part(
    record: RequestRecord, part: WorkerPart, root: Span, rng: random.Random
) -> Iterator[Span]:
    own = (_COMPUTING if part.computes_prompt else _READING) + _GENERATING
    points = {e: at_s for e, at_s in part.timeline.points.items() if e in own}
    if not points:
        return
    shift_s = clock_shift_s(
        record.timeline.points.get(Event.PLACED, root.start_s),
        part.arrived_at_s,
        min(points.values()),
        max(points.values()),
    )
    where = (f"baton-{part.role.value}", str(part.worker_id))
    engine = part.timeline.engine
    use: dict[str, AttributeValue] = {
        "baton.engine_seconds": engine.seconds,
        "baton.engine_steps": engine.num_steps,
    }
    shown: list[tuple[str, Event, Event, Mapping[str, AttributeValue]]] = [
        ("prefill queue", Event.PREFILL_QUEUED, Event.PREFILL_STARTED, {}),
        ("prefill", Event.PREFILL_STARTED, Event.PREFILL_ENDED, use),
        ("kv transfer", Event.TRANSFER_STARTED, Event.TRANSFER_ENDED, _transfer(part)),
        ("decode", Event.DECODE_STARTED, Event.DECODE_ENDED, use),
    ]
    for name, start, end, attributes in shown:
        if start in points and end in points:
            yield _child(
                root, rng, name, points[start] + shift_s, points[end] + shift_s, where, attributes
            )


def _transfer(part: WorkerPart) -> Mapping[str, AttributeValue]:
    stats = part.timeline.transfer
    return {
        "baton.kv_bytes": stats.num_bytes,
        "baton.kv_blocks": stats.num_blocks,
        "baton.kv_reads": stats.num_reads,
        "baton.kv_transfer_seconds": stats.seconds,
        "baton.kv_transfer_exposed_seconds": stats.exposed_seconds,
    }


def _child(
    root: Span,
    rng: random.Random,
    name: str,
    start_s: float,
    end_s: float,
    where: tuple[str, str] | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Span:
    service, instance = where or (root.service, root.instance)
    return Span(
        name,
        root.trace_id,
        rng.getrandbits(64) or 1,
        root.span_id,
        start_s,
        max(start_s, end_s),
        service=service,
        instance=instance,
        attributes=attributes or {},
        trace_state=root.trace_state,
    )
