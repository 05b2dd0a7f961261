"""What admission shows of itself: counters, gauges and histograms.

Class names come from the settings; tenants from clients, so only the busiest have labels of their
own.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection

from baton.core import metrics as series
from baton.telemetry.metrics import Metrics
from services.router.admission.admission import Lane
from services.router.admission.request_outcome import Outcome
from services.router.admission.slo import SloTargets
from services.router.admission.slo_config import SloConfig
from services.router.admission.ticket import Ticket
from services.router.pool_stats_book import PoolStatsBook
from services.router.tenants.tenant_labels import MAX_TENANT_LABELS, OTHER, TenantLabels, label_of


class AdmissionRecorder:
    """One per router."""

    def __init__(
        self,
        metrics: Metrics,
        slo: SloConfig,
        tenants: TenantLabels | None = None,
        stats: PoolStatsBook | None = None,
    ) -> None:
        """`tenants`: shared with others that count by tenant. `stats`: what planners are told."""
        self._metrics = metrics
        self._stats = stats
        self._class_names = tuple(slo.classes)
        self._tenants = tenants or TenantLabels()
        self._shown_tenants: set[str] = set()

    def arrived(self) -> None:
        """Before anything is decided of a request."""
        if self._stats is not None:
            self._stats.arrived()

    def admitted(self, ticket: Ticket) -> None:
        has_waited = ticket.wait_started_at_s is not None
        result = "waited" if has_waited else "at_once"
        self._metrics.add(series.ADMISSIONS, 1, ticket.slo_class, result)
        if ticket.wait_started_at_s is not None:
            wait_s = ticket.admitted_at_s - ticket.wait_started_at_s
            self._metrics.observe(series.ADMISSION_WAIT, wait_s, ticket.slo_class)

    def refused(self, ticket: Ticket, now_s: float) -> None:
        assert ticket.refusal is not None
        if self._stats is not None:
            self._stats.refused()
        self._metrics.add(series.ADMISSIONS, 1, ticket.slo_class, ticket.refusal.value)
        observe = self._metrics.observe
        observe(series.ADMISSION_REFUSAL, now_s - ticket.arrived_at_s, "arrival")
        if not math.isnan(ticket.unreachable_at_s):
            late_s = max(0.0, now_s - ticket.unreachable_at_s)
            observe(series.ADMISSION_REFUSAL, late_s, "unreachable")

    def ended(self, ticket: Ticket, outcome: Outcome, *, work_tokens: float) -> None:
        """An admitted request is over."""
        result = outcome.result(ticket.targets)
        if self._stats is not None:
            self._judge(self._stats, ticket.targets, outcome)
        add, name = self._metrics.add, ticket.slo_class
        add(series.TENANT_WORK, work_tokens, self._tenants.label(ticket.tenant))
        for objective, is_met in (
            ("ttft", result.is_ttft_met),
            ("itl", result.is_itl_met),
            ("all", result.is_met),
        ):
            if is_met is not None:
                add(series.SLO_REQUESTS, 1, name, objective, "met" if is_met else "missed")
        for objective, predicted_s, actual_s in (
            ("ttft", ticket.predicted_ttft_s, outcome.ttft_s),
            ("itl", ticket.predicted_itl_s, outcome.mean_itl_s),
        ):
            if predicted_s and actual_s is not None:
                self._metrics.observe(series.PREDICTION_RATIO, actual_s / predicted_s, objective)

    def update(self, lanes: Collection[Lane], now_s: float) -> None:
        """The gauges, now."""
        waiting, oldest_s = Counter[str](), dict.fromkeys(self._class_names, 0.0)
        by_tenant = Counter[str]()
        for lane in lanes:
            for name, (num_waiting, age_s) in lane.waiting_by_class(now_s).items():
                waiting[name] += num_waiting
                oldest_s[name] = max(oldest_s.get(name, 0.0), age_s)
            for tenant, num_waiting in lane.queue.tenants():
                by_tenant[tenant] += num_waiting
        for name in self._class_names:
            self._metrics.set(series.ADMISSION_QUEUE, waiting[name], name)
            self._metrics.set(series.ADMISSION_OLDEST, oldest_s[name], name)
        self._metrics.set(
            series.ADMISSION_QUEUED_TOKENS, sum(lane.queue.queued_tokens for lane in lanes)
        )
        self._metrics.set(
            series.ADMISSION_SHEDDING, float(any(lane.is_shedding(now_s) for lane in lanes))
        )
        ttft_margin_s = max((lane.ttft_margin_s for lane in lanes), default=0.0)
        itl_margin_s = max((lane.itl_margin_s for lane in lanes), default=0.0)
        self._metrics.set(series.ADMISSION_MARGIN, ttft_margin_s, "ttft")
        self._metrics.set(series.ADMISSION_MARGIN, itl_margin_s, "itl")
        self._show_tenants(by_tenant)

    def _judge(self, stats: PoolStatsBook, own: SloTargets, outcome: Outcome) -> None:
        """What a request was not promised anything for is judged by the planner's targets."""
        others = stats.targets
        targets = SloTargets(
            others.ttft_s if own.ttft_s is None else own.ttft_s,
            others.itl_s if own.itl_s is None else own.itl_s,
        )
        judged = outcome.result(targets)
        stats.judged(is_ttft_met=judged.is_ttft_met, is_itl_met=judged.is_itl_met)

    def _show_tenants(self, waiting: Counter[str]) -> None:
        largest = heapq.nlargest(MAX_TENANT_LABELS, waiting, key=waiting.__getitem__)
        shown = Counter[str]()
        for tenant, num_waiting in waiting.items():
            shown[label_of(tenant) if tenant in largest else OTHER] += num_waiting
        for label in self._shown_tenants - shown.keys():
            self._metrics.remove(series.ADMISSION_TENANT_QUEUE, label)
        for label, num_waiting in shown.items():
            self._metrics.set(series.ADMISSION_TENANT_QUEUE, num_waiting, label)
        self._shown_tenants = set(shown)
