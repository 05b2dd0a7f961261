"""What a planner shows of itself, for dashboards, alerts and autoscalers that act on its numbers.

Series change on the planner's thread; `page` is made after each step and may be read on any.

Does not know: HTTP.
"""

from __future__ import annotations

from baton.core import planner_metrics as series
from baton.core.worker_info import Role
from baton.telemetry.metrics import Metrics
from services.planner.autoscale import PoolDecision, PoolState
from services.planner.autoscale_config import AutoscaleConfig
from services.planner.decision_record import Record, Term, to_line


class PlannerGauges:
    """One per planner."""

    def __init__(self) -> None:
        self._metrics = Metrics(series.PLANNER_SERIES, shows_process=True)
        self.content_type = self._metrics.content_type
        self.page = self._metrics.render()
        """The text of /metrics."""
        self.last_decision = b"null"
        """Its record, as JSON."""

    def read(self, num_routers: int, num_failed: int) -> None:
        """Statistics were asked for."""
        self._metrics.set(series.ROUTERS, num_routers)
        if num_failed:
            self._metrics.add(series.FAILURES, num_failed, "read")

    def failed(self, stage: str) -> None:
        """One of `planner_metrics.STAGES`."""
        assert stage in series.STAGES, stage
        self._metrics.add(series.FAILURES, 1, stage)

    def decided(self, record: Record) -> None:
        show, seen, decision = self._metrics.set, record.seen, record.decision
        for role, state, of_pool in (
            (Role.PREFILL, seen.prefill, decision.prefill),
            (Role.DECODE, seen.decode, decision.decode),
        ):
            self._pool(role.value, state, of_pool)
        self._term("prefill", record.prefill_seconds)
        self._term("decode_step", record.decode_step)
        show(series.ARRIVALS, seen.load.rate_per_s, "now")
        show(series.ARRIVALS, decision.forecast.rate_per_s, "predicted")
        for target, share in (("ttft", seen.ttft_attainment), ("itl", seen.itl_attainment)):
            if share is not None:
                show(series.PLANNER_ATTAINMENT, share, target)
        if decision.num_role_changes:
            to = Role.DECODE if decision.num_role_changes > 0 else Role.PREFILL
            self._metrics.add(series.ROLE_CHANGES, abs(decision.num_role_changes), to.value)
        show(series.DEVICES, desired_devices(record), "desired")
        show(series.DEVICES, record.config.max_devices, "budget")
        show(series.AT_BUDGET, float(decision.is_at_budget))
        show(series.DECIDED_AT, seen.now_s)
        self.last_decision = to_line(record).encode()

    def render(self) -> None:
        """Make `page` anew, after a step."""
        self.page = self._metrics.render()

    def _pool(self, pool: str, state: PoolState, decision: PoolDecision) -> None:
        show = self._metrics.set
        show(series.DESIRED_WORKERS, decision.desired, pool)
        counts = (state.num_ready, state.num_starting, state.num_draining)
        for name, num in zip(series.STATES, counts, strict=True):
            show(series.POOL_WORKERS, num, pool, name)
        show(series.MARGIN, decision.margin, pool)
        have = state.num_ready + state.num_starting
        direction = (
            "hold" if decision.desired == have else "up" if decision.desired > have else "down"
        )
        self._metrics.add(series.DECISIONS, 1, pool, direction)

    def _term(self, name: str, term: Term) -> None:
        self._metrics.set(series.PLANNER_PREDICTION_ERROR, term.error_ratio, name)
        self._metrics.set(series.CORRECTION, term.ratio, name)


def desired_devices(record: Record) -> int:
    """Of both pools together."""
    config: AutoscaleConfig = record.config
    return (
        record.decision.prefill.desired * config.prefill.devices_per_worker
        + record.decision.decode.desired * config.decode.devices_per_worker
    )
