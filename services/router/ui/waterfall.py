"""One request as the page draws it: what happened when, on which worker.

    start_ms, end_ms     since its arrival at the router, on the router's clock

Made of the same spans as a trace (`request_spans`). Pure. Does not know: HTTP, tenants.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.trace import TraceContext
from baton.telemetry.spans import AttributeValue, Span
from services.router.requests.request_record import RequestRecord
from services.router.requests.request_spans import spans_of

_NO_PARENT = TraceContext(1, 0, False)
# Ids of spans are drawn and not shown.
_IDS = random.Random(0)
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Row:
    """One bar."""

    name: str
    place: str
    """Worker id, or `router`."""
    role: str
    """Pool of the worker; empty for the router."""
    start_ms: float
    end_ms: float
    detail: dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Brief:
    """A line of the list of requests."""

    id: str
    model: str
    arrived_at_s: float
    is_running: bool
    state: str
    """Finish reason, `waiting` or `running`."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_ms: float | None
    itl_ms: float | None
    total_ms: float
    workers: list[str]


@dataclass(frozen=True, slots=True)
class Waterfall:
    request: Brief
    rows: list[Row]
    first_token_ms: float | None
    placement: str
    """Why it was placed as it was; of the last placement."""
    failures: list[str]
    """Of placements that were given up."""
    moves: list[str]
    error: str


def brief(record: RequestRecord, *, is_running: bool, now_s: float) -> Brief:
    """`now_s`: wall clock."""
    arrived_s = record.timeline.points.get(Event.ARRIVED, now_s)
    end_s = now_s if is_running else max(record.last_token_at_s, arrived_s)
    itl_s = record.mean_itl_s
    return Brief(
        id=record.request_id,
        model=record.model,
        arrived_at_s=arrived_s,
        is_running=is_running,
        state=_state(record, is_running),
        prompt_tokens=record.num_prompt_tokens,
        cached_tokens=record.num_cached_tokens or 0,
        output_tokens=record.num_output_tokens,
        ttft_ms=_ms(record.timeline.seconds(Event.ARRIVED, Event.FIRST_TOKEN)),
        itl_ms=_ms(itl_s),
        total_ms=round(1e3 * (end_s - arrived_s), 3),
        workers=_workers(record),
    )


def waterfall(record: RequestRecord, *, is_running: bool, now_s: float) -> Waterfall:
    """Of a running request, with what is known of it so far."""
    root, *spans = spans_of(record, _NO_PARENT, _IDS, router_id=ROUTER, now_s=now_s)
    rows = [_row(span, root) for span in spans]
    moves = [
        f"{move.source} to {move.target} ({move.trigger.value}): {move.state.value}"
        + (f", {move.failure}" if move.failure else "")
        for move in record.migrations
    ]
    error = record.error
    return Waterfall(
        request=brief(record, is_running=is_running, now_s=now_s),
        rows=sorted(rows, key=lambda row: (row.start_ms, row.end_ms)),
        first_token_ms=_ms(record.timeline.seconds(Event.ARRIVED, Event.FIRST_TOKEN)),
        placement=record.placements[-1].reason if record.placements else "",
        failures=list(record.failures),
        moves=moves,
        error="" if error is None else f"{type(error).__name__}: {error}"[:500],
    )


def _row(span: Span, root: Span) -> Row:
    is_router = span.instance == ROUTER
    return Row(
        name=span.name,
        place=span.instance,
        role="" if is_router else span.service.removeprefix("baton-"),
        start_ms=round(1e3 * (span.start_s - root.start_s), 3),
        end_ms=round(1e3 * (span.end_s - root.start_s), 3),
        detail={name.removeprefix("baton."): value for name, value in span.attributes.items()},
    )


def _state(record: RequestRecord, is_running: bool) -> str:
    if is_running:
        return "running" if record.placements else "waiting"
    return "error" if record.finish_reason is None else record.finish_reason.value


def _workers(record: RequestRecord) -> list[str]:
    """In order of their first part in it."""
    names = [str(w) for placement in record.placements for w in placement.workers]
    names += [str(move.target) for move in record.migrations if move.has_moved]
    return list(dict.fromkeys(names))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
