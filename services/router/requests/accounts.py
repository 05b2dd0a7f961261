"""What requests have used, by tenant, and what of it was good: counters for chargeback and goodput.

Engine time is what workers measured of each request, told with its last delta. A request that is
cancelled, or that the router ends at a stop string, has its last delta before the engine lets go of
it: its worker tells the rest later, under the id the request had there.

Does not know: durations, log lines, how tenants are told apart.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from baton.core import metrics as series
from baton.core.lifecycle import EngineUse
from baton.core.request import FinishReason
from baton.core.worker_info import Role
from baton.telemetry.metrics import Metrics
from services.router.admission.request_outcome import outcome_of
from services.router.admission.ticket import Ticket
from services.router.requests.request_record import RequestRecord
from services.router.tenants.tenant_labels import TenantLabels

MAX_OWED = 8192
"""Requests that some worker has yet to speak of; beyond, the oldest are forgotten."""
_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


class _Owed(NamedTuple):
    tenant: str
    """Its label."""
    model: str


class Accounts:
    """One per router."""

    def __init__(self, metrics: Metrics, tenants: TenantLabels) -> None:
        self._metrics = metrics
        self._tenants = tenants
        self._seen: set[str] = set()
        self._owed: OrderedDict[str, _Owed] = OrderedDict()

    def started(self, record: RequestRecord) -> None:
        """Its tenant's counters are there from now on: increases from nothing are not seen."""
        label = self._tenants.label(record.tenant)
        if label in self._seen:
            return
        self._seen.add(label)
        for family in (
            series.TENANT_REQUESTS,
            series.TENANT_PROMPT_TOKENS,
            series.TENANT_CACHED_TOKENS,
            series.TENANT_GENERATION_TOKENS,
        ):
            self._metrics.add(family, 0, label)
        for role in Role:
            self._metrics.add(series.TENANT_ENGINE, 0, label, role.value)

    def left(self, record: RequestRecord, wire_id: str) -> None:
        """Workers that have not finished with the request know it by this id."""
        self._owed[wire_id] = _Owed(self._tenants.label(record.tenant), record.model)
        if len(self._owed) > MAX_OWED:
            self._owed.popitem(last=False)

    def late_use(self, wire_id: str, role: Role, use: EngineUse) -> None:
        """A worker has let go of a request that is over here."""
        owed = self._owed.get(wire_id)
        if owed is not None and use.seconds > 0:
            self._metrics.add(series.TENANT_ENGINE, use.seconds, owed.tenant, role.value)

    def ended(self, record: RequestRecord, ticket: Ticket | None) -> None:
        """Once per request; those that were turned away have used nothing."""
        metrics, model = self._metrics, record.model
        if ticket is not None and record.finish_reason in _WHOLE:
            is_met = outcome_of(record).result(ticket.targets).is_met
            if is_met is not False:
                labels = (model, ticket.slo_class)
                metrics.add(series.GOODPUT_REQUESTS, 1, *labels)
                metrics.add(series.GOODPUT_TOKENS, record.num_output_tokens, *labels)
        for role, seconds in record.engine_seconds().items():
            metrics.observe(series.REQUEST_ENGINE, seconds, model, role.value)
        if record.placements:
            self._charge(record)

    def _charge(self, record: RequestRecord) -> None:
        metrics, tenant = self._metrics, self._tenants.label(record.tenant)
        metrics.add(series.TENANT_REQUESTS, 1, tenant)
        metrics.add(series.TENANT_PROMPT_TOKENS, record.num_prompt_tokens, tenant)
        metrics.add(series.TENANT_CACHED_TOKENS, record.num_cached_tokens or 0, tenant)
        metrics.add(series.TENANT_GENERATION_TOKENS, record.num_output_tokens, tenant)
        for role, seconds in record.engine_seconds().items():
            metrics.add(series.TENANT_ENGINE, seconds, tenant, role.value)
