"""One planner: from what router copies tell to a decision that is logged and shown.

    sums of all copies ─► observer ─► correction of the models ─► autoscaler ─► orders
                                                                      └─► decision log, gauges

Writes its log and reads no clock. Does not know: where the sums come from, how orders are carried
out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from baton.core.errors import ConfigError
from services.planner.actuator import PlannedWorker
from services.planner.autoscale import Autoscaler, Decision
from services.planner.autoscale_config import AutoscaleConfig
from services.planner.corrections import Corrections
from services.planner.decision_log import DecisionLog
from services.planner.decision_record import VERSION, Models, Record, Replay
from services.planner.observer import Observer, Seen
from services.planner.orders import Order, orders
from services.planner.planner_gauges import PlannerGauges
from services.router.pool_stats import PoolStats

logger = logging.getLogger(__name__)


MAX_BACK_S = 60.0
"""That a clock may be put back by, as clocks are that follow others."""


@dataclass(frozen=True, slots=True)
class Decided:
    seen: Seen
    decision: Decision
    orders: tuple[Order, ...]
    """Empty where nobody says which workers there are."""


class Planner:
    """`decide` every few seconds, on one thread. Times are Unix seconds."""

    def __init__(
        self, config: AutoscaleConfig, models: Models, log: DecisionLog, gauges: PlannerGauges
    ) -> None:
        """Goes on from what `log` holds, where that is of the same settings and models."""
        self._config, self._models = config, models
        self._log, self._gauges = log, gauges
        self._autoscaler = Autoscaler(config, models.prefill, models.decode)
        self._observer = Observer()
        self._corrections = Corrections(models)
        self._number = 0
        self._last_s = float("-inf")
        self._told_targets = False
        self._resume()

    def decide(
        self,
        now_s: float,
        copies: Mapping[str, PoolStats],
        workers: Sequence[PlannedWorker] | None = None,
    ) -> Decided | None:
        """`copies`: the routers that answered. `workers`: None where somebody else starts them.
        None when there is nothing to compare with yet. A clock that goes back a little stands
        still here; one that goes back far has been set, and everything begins anew.
        """
        if now_s < self._last_s - MAX_BACK_S:
            self._begin_anew(now_s)
        now_s = self._last_s = max(now_s, self._last_s)
        self._check_targets(copies)
        seen = self._observer.observe(now_s, copies, workers)
        if seen is None:
            return None
        self._corrections.observe(seen, cold_s=self._config.cold_s)
        used = self._corrections.models()
        self._autoscaler.use(used.prefill, used.decode)
        state = self._autoscaler.state() if self._log.prepare() else None
        decision = self._autoscaler.decide(seen.observation)
        given = () if workers is None else tuple(orders(decision, workers, self._config))
        record = Record(
            VERSION,
            self._number,
            datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            self._config,
            self._models,
            self._corrections.prefill_term,
            self._corrections.decode_term,
            used,
            seen.num_copies,
            seen.num_refused,
            seen.observation,
            decision,
            tuple(f"{o.kind.value} {o.role.value} {o.worker}".rstrip() for o in given),
            state,
        )
        self._number += 1
        self._log.write(record)
        self._gauges.decided(record)
        _tell(record)
        return Decided(seen, decision, given)

    def _resume(self) -> None:
        records = self._log.resume()
        if not records:
            return
        last = records[-1]
        self._number = last.number + 1
        if (last.config, last.models) != (self._config, self._models):
            logger.info("settings or models have changed: nothing is taken over from the log")
            return
        again = Replay()
        try:
            for record in records:
                again.step(record)
        except ConfigError as error:
            logger.warning("starting without what was learnt before: %s", error)
            return
        assert again.autoscaler is not None
        self._autoscaler, self._last_s = again.autoscaler, last.seen.now_s
        self._corrections.restore(last.prefill_seconds, last.decode_step)
        logger.info("going on from decision %d of %s", last.number, last.at)

    def _begin_anew(self, now_s: float) -> None:
        logger.warning(
            "the clock went back by %.0f s: what was learnt is forgotten", self._last_s - now_s
        )
        self._autoscaler = Autoscaler(self._config, self._models.prefill, self._models.decode)
        self._observer = Observer()
        # How fast workers are is as true as before; when that was measured is not.
        self._corrections.restore(self._corrections.prefill_term, self._corrections.decode_term)
        self._last_s = now_s
        self._log.forget()

    def _check_targets(self, copies: Mapping[str, PoolStats]) -> None:
        """Attainment is of what routers judge by, so that should be what is planned for."""
        wanted = (self._config.ttft_s, self._config.itl_s)
        others = {
            name: (stats.ttft_target_s, stats.itl_target_s)
            for name, stats in copies.items()
            if (stats.ttft_target_s, stats.itl_target_s) != wanted
        }
        if others and not self._told_targets:
            name, (ttft_s, itl_s) = next(iter(others.items()))
            logger.warning(
                "router %s judges requests by TTFT %g s and ITL %g s, planned for are %g s and %g "
                "s: set pool_stats.ttft_s and pool_stats.itl_s of the routers to these",
                name, ttft_s, itl_s, *wanted,
            )  # fmt: skip
        self._told_targets = bool(others)


def _tell(record: Record) -> None:
    """What was begun is worth a line; that nothing changes is not."""
    decision = record.decision
    if record.orders:
        logger.info(
            "decision %d: %s (prefill: %s; decode: %s)",
            record.number, ", ".join(record.orders), decision.prefill.reason,
            decision.decode.reason,
        )  # fmt: skip
