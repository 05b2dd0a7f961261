"""What remains of a request: its series and one log line, both from the same record.

Durations come from the time points of `baton.core.lifecycle` and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Protocol

from baton.core import metrics as series
from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.logging import log_fields
from baton.core.request import FinishReason, RequestId
from baton.core.worker_info import Role
from baton.telemetry.metrics import Metrics, Observer
from services.router.admission.ticket import Ticket
from services.router.migration.handover import Handover
from services.router.placement.perf_observer import PerfObserver
from services.router.placement.placement import Placement, Prediction, ScoreTerms
from services.router.pool_stats_book import PoolStatsBook
from services.router.requests.accounts import Accounts
from services.router.requests.request_record import RequestRecord
from services.router.tenants.tenant_labels import TenantLabels

logger = logging.getLogger(__name__)

MAX_LOGGED_CANDIDATES = 8
_SPANS = (
    (series.TTFT, Event.ARRIVED, Event.FIRST_TOKEN),
    (series.E2E, Event.ARRIVED, Event.LAST_TOKEN),
    (series.QUEUE, Event.PREFILL_QUEUED, Event.PREFILL_STARTED),
    (series.PREFILL, Event.PREFILL_STARTED, Event.PREFILL_ENDED),
    (series.DECODE, Event.DECODE_STARTED, Event.DECODE_ENDED),
)


class EndedSink(Protocol):
    """Who is given whole records: a tracer, the page at /ui."""

    def ended(self, record: RequestRecord) -> None:
        """Once per request that was not turned away. Must not block."""
        ...


class RequestRecorder:
    """Turns records into series and log lines."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        accounts: Accounts | None = None,
        observer: PerfObserver | None = None,
        ended: Sequence[EndedSink] = (),
        stats: PoolStatsBook | None = None,
    ) -> None:
        """`observer`: who learns from requests that have ended. `ended`: who keeps them. `stats`:
        what planners are told."""
        self._metrics = metrics
        self._stats = stats
        self._accounts = accounts or Accounts(metrics, TenantLabels())
        self._observer = observer
        self._ended = ended
        self._itl: dict[str, Observer] = {}
        self._live: dict[RequestId, RequestRecord] = {}
        self._models_waiting: set[str] = set()

    @property
    def live(self) -> Collection[RequestRecord]:
        """Of requests that still run, oldest first."""
        return self._live.values()

    def started(self, record: RequestRecord) -> None:
        self._live[record.request_id] = record
        self._metrics.add(series.RUNNING, 1)
        self._accounts.started(record)

    def update(self) -> None:
        """To be called once a second: what can be said of requests before they end."""
        waiting = dict.fromkeys(self._models_waiting, 0)
        for record in self._live.values():
            self._count_tokens(record)
            if not record.placements:
                waiting[record.model] = waiting.get(record.model, 0) + 1
        for model, num_waiting in waiting.items():
            self._metrics.set(series.WAITING, num_waiting, model)
        self._models_waiting = set(waiting)

    def placed(self, record: RequestRecord, placement: Placement, at_s: float) -> None:
        kind = "replay" if record.placements else placement.kind.value
        record.placements.append(placement)
        record.timeline.record(Event.PLACED, at_s)
        self._metrics.add(series.PLACEMENTS, 1, kind)
        if placement.offer is not None:
            role = placement.terms_of(placement.computes_prompt).role
            self._metrics.add(series.PREFIX_OFFERS, 1, role.value)

    def slow_client(self) -> None:
        """A request was given up because nobody read its output."""
        self._metrics.add(series.SLOW_CLIENTS, 1)

    def paused(self, record: RequestRecord, pause_s: float) -> None:
        """Tokens go on after a move."""
        self._metrics.observe(series.MIGRATION_PAUSE, pause_s, record.model)

    def tokens(self, record: RequestRecord, num_tokens: int, at_s: float) -> None:
        """New tokens arrived together at `at_s`; called for every one of them, hence short."""
        num_gaps, gap_s = num_tokens, 0.0
        if record.num_output_tokens:
            gap_s = (at_s - record.last_token_at_s) / num_tokens
        else:
            record.timeline.record(Event.FIRST_TOKEN, at_s)
            num_gaps -= 1
        if num_gaps:
            observe = self._itl.get(record.model) or self._itl_observer(record.model)
            observe(gap_s, num_gaps)
        record.num_output_tokens += num_tokens
        record.last_token_at_s = at_s

    def cached(
        self, record: RequestRecord, role: Role, num_cached_tokens: int, *, computes_prompt: bool
    ) -> None:
        """A worker has said what it found in its prefix cache."""
        if computes_prompt and record.num_cached_tokens is None:
            record.num_cached_tokens = num_cached_tokens
            if self._stats is not None:
                self._stats.prompt(record.num_prompt_tokens, num_cached_tokens)
        labels = (record.model, role.value)
        self._metrics.add(series.PREFIX_QUERY_TOKENS, record.num_prompt_tokens, *labels)
        self._metrics.add(series.PREFIX_HIT_TOKENS, num_cached_tokens, *labels)

    def left(self, record: RequestRecord, wire_id: RequestId) -> None:
        """A placement is over before all its workers have finished with it."""
        self._accounts.left(record, wire_id)

    def ended(self, record: RequestRecord, ticket: Ticket | None = None) -> None:
        """Once per request that was started."""
        metrics, model = self._metrics, record.model
        if record.num_output_tokens:
            record.timeline.record(Event.LAST_TOKEN, record.last_token_at_s)
        metrics.add(series.RUNNING, -1)
        self._live.pop(record.request_id, None)
        if record.is_turned_away:
            return
        self._accounts.ended(record, ticket)
        finish = record.finish_reason or FinishReason.ERROR
        metrics.add(series.REQUESTS, 1, model, finish.value)
        self._count_tokens(record)
        if self._stats is not None and record.num_output_tokens:
            self._stats.output(record.num_prompt_tokens, record.num_output_tokens)
        if finish in (FinishReason.STOP, FinishReason.LENGTH):
            metrics.add(series.PROMPT_TOKENS, record.num_prompt_tokens, model)
            metrics.add(series.CACHED_TOKENS, record.num_cached_tokens or 0, model)
            metrics.observe(series.REQUEST_PROMPT_TOKENS, record.num_prompt_tokens, model)
            metrics.observe(series.REQUEST_GENERATION_TOKENS, record.num_output_tokens, model)
        spans = [(f, record.timeline.seconds(start, end)) for f, start, end in _SPANS]
        known = [(family, seconds) for family, seconds in spans if seconds is not None]
        for family, seconds in known:
            metrics.observe(family, seconds, model)
        mean_itl_s = record.mean_itl_s
        if mean_itl_s is not None:
            metrics.observe(series.MEAN_ITL, mean_itl_s, model)
        transfer = record.timeline.transfer
        if transfer.num_reads:
            metrics.observe(series.TRANSFER, transfer.seconds, model)
            metrics.observe(series.TRANSFER_EXPOSED, transfer.exposed_seconds, model)
            metrics.observe(series.TRANSFER_BYTES, transfer.num_bytes, model)
            if transfer.hidden_share is not None:
                metrics.observe(series.TRANSFER_HIDDEN, transfer.hidden_share, model)
        if self._observer is not None and finish in (FinishReason.STOP, FinishReason.LENGTH):
            self._learn(self._observer, record)
        _log(record, finish, known)
        for sink in self._ended:
            sink.ended(record)

    def _count_tokens(self, record: RequestRecord) -> None:
        num_new = record.num_output_tokens - record.num_counted_tokens
        record.num_counted_tokens = record.num_output_tokens
        self._metrics.add(series.GENERATION_TOKENS, num_new, record.model)

    def _learn(self, observer: PerfObserver, record: RequestRecord) -> None:
        """From a request that ran where it was placed: of others the times are of several."""
        if len(record.placements) == 1 and not record.failures and not record.migrations:
            observer.observe(
                record.placements[0],
                record.timeline,
                num_prompt_tokens=record.num_prompt_tokens,
                num_cached_tokens=record.num_cached_tokens or 0,
                num_output_tokens=record.num_output_tokens,
            )
            if self._stats is not None:
                _tell_prefill(self._stats, record)

    def _itl_observer(self, model: str) -> Observer:
        observer = self._itl[model] = self._metrics.observer(series.ITL, model)
        return observer


def _tell_prefill(stats: PoolStatsBook, record: RequestRecord) -> None:
    """Its prompt's share of a prefill worker's steps."""
    for part in record.parts:
        engine = part.timeline.engine
        if part.role is Role.PREFILL and part.computes_prompt and engine.num_steps:
            cached = record.num_cached_tokens or 0
            stats.prefill_steps(record.num_prompt_tokens - cached, cached, engine.seconds)


def _log(
    record: RequestRecord, finish: FinishReason, spans: Sequence[tuple[series.Series, float]]
) -> None:
    """`spans`: durations as they have gone into the histograms."""
    transfer = record.timeline.transfer
    log_fields(
        logger,
        "request ended",
        request_id=record.request_id,
        **({} if record.trace is None else {"trace_id": f"{record.trace.trace_id:032x}"}),
        model=record.model,
        finish_reason=finish.value,
        error=None if record.error is None else f"{type(record.error).__name__}: {record.error}",
        prompt_tokens=record.num_prompt_tokens,
        completion_tokens=record.num_output_tokens,
        cached_tokens=record.num_cached_tokens,
        **{family.name.removeprefix("baton_"): round(s, 6) for family, s in spans},
        kv_transfer_bytes=transfer.num_bytes,
        kv_transfer_seconds=round(transfer.seconds, 6),
        kv_transfer_exposed_seconds=round(transfer.exposed_seconds, 6),
        kv_transfer_hidden_ratio=_rounded(transfer.hidden_share),
        placements=[placement_fields(p) for p in record.placements],
        migrations=[_migration_fields(m) for m in record.migrations],
        failures=record.failures,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _migration_fields(move: Handover) -> dict[str, object]:
    return {
        "source": move.source,
        "target": move.target,
        "trigger": move.trigger.value,
        "state": move.state.value,
        "failure": move.failure,
        "seconds": round(move.seconds, 6),
        "pause_seconds": _rounded(move.pause_s),
        "transfer_bytes": move.transfer.num_bytes,
    }


def _rounded_fields(values: ScoreTerms | Prediction) -> dict[str, object]:
    return {
        name: round(value, 6) if type(value) is float else value
        for name, value in zip(values._fields, values, strict=True)
    }


def placement_fields(placement: Placement) -> dict[str, object]:
    """A placement as JSON: the decision and the terms of its best candidates."""
    workers = placement.workers
    ranked = sorted(
        placement.terms,
        key=lambda t: (t.worker_id not in workers, t.prefill_cost + t.decode_cost),
    )
    predicted = placement.predicted
    return {
        "kind": placement.kind.value,
        "prefill": placement.prefill,
        "decode": placement.decode,
        "score": round(placement.score, 6),
        "handoff_s": round(placement.handoff_s, 6),
        "predicted": None if predicted is None else _rounded_fields(predicted),
        "reason": placement.reason,
        "offer": None if placement.offer is None else placement.offer._asdict(),
        "candidates": [
            {**_rounded_fields(t), "role": t.role.value} for t in ranked[:MAX_LOGGED_CANDIDATES]
        ],
        "num_candidates": max(placement.num_candidates, len(ranked)),
    }
