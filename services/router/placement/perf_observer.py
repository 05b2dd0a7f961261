"""What a finished request teaches the performance model, and how wrong the model was.

Each duration is taken where it was measured: prefill, queue and decode on the workers, the first
token at the router. What the worker had to do meanwhile is the mean of two pictures: as the request
was placed, and as it ended.

Does not know: how the model learns, which requests are worth learning from.
"""

from __future__ import annotations

from baton.core import metrics as series
from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.lifecycle import Timeline
from baton.core.worker_info import Role
from baton.telemetry.metrics import Metrics
from services.router.placement.load_book import Column
from services.router.placement.perf_model import PerfModel, Quantity
from services.router.placement.placement import Placement
from services.router.placement.worker_table import WorkerTable
from services.router.pool_stats_book import PoolStatsBook

MIN_DECODE_TOKENS = 8
"""Of fewer tokens the mean gap is a matter of chance."""


class PerfObserver:
    """Feeds one model from one router's requests."""

    def __init__(
        self,
        perf: PerfModel,
        table: WorkerTable,
        metrics: Metrics,
        stats: PoolStatsBook | None = None,
    ) -> None:
        """`stats`: what planners are told."""
        self._stats = stats
        self._perf = perf
        self._table = table
        self._metrics = metrics

    def observe(
        self,
        placement: Placement,
        timeline: Timeline,
        *,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_output_tokens: int,
    ) -> None:
        """`timeline` of a request that began and ended on the workers of `placement`."""
        computes = placement.computes_prompt
        terms = placement.terms_of(computes)
        role = terms.role
        prefill_s = timeline.seconds(Event.PREFILL_STARTED, Event.PREFILL_ENDED)
        if prefill_s is not None:
            uncached = num_prompt_tokens - num_cached_tokens
            self._perf.observe_prefill(role, computes, uncached, num_cached_tokens, prefill_s)
            self._show(Quantity.PREFILL, role)
        queue_s = timeline.seconds(Event.PREFILL_QUEUED, Event.PREFILL_STARTED)
        if queue_s is not None:
            self._perf.observe_queue(role, computes, terms.queued_prefill, queue_s)
        ttft_s = timeline.seconds(Event.PLACED, Event.FIRST_TOKEN)
        if ttft_s is not None and placement.predicted is not None:
            self._perf.observe_ttft(role, placement.predicted.ttft_s, ttft_s)
            self._show(Quantity.TTFT, role)
        self._observe_decode(placement, timeline, num_output_tokens)

    def _observe_decode(
        self, placement: Placement, timeline: Timeline, num_output_tokens: int
    ) -> None:
        decode_s = timeline.seconds(Event.DECODE_STARTED, Event.DECODE_ENDED)
        worker_id = placement.decode or placement.computes_prompt
        row = self._table.get(worker_id)
        if decode_s is None or row is None or num_output_tokens < MIN_DECODE_TOKENS:
            return
        then, now = placement.terms_of(worker_id), row.book.figures()
        # Neither picture holds the request itself.
        batch = 1 + (then.num_sequences + now[Column.SEQUENCES]) / 2
        kv_tokens = (then.resident_kv + now[Column.RESIDENT]) / 2
        kv_tokens += then.cached + then.uncached + num_output_tokens / 2
        gap_s = decode_s / (num_output_tokens - 1)
        self._perf.observe_itl(then.role, worker_id, batch, kv_tokens, gap_s)
        if self._stats is not None and then.role is Role.DECODE:
            self._stats.decode_steps(batch, kv_tokens, gap_s)
        self._show(Quantity.ITL, then.role)

    def _show(self, quantity: Quantity, role: Role) -> None:
        error_ratio = self._perf.error_ratio(quantity, role)
        self._metrics.set(series.PERF_ERROR, error_ratio, quantity.value, role.value)
