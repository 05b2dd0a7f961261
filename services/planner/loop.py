"""The live planner: reads, decides, acts, once an interval. A thin shell around `planner`.

    step(now):  routers' statistics ─► Planner.decide ─► orders to the pools

No step raises for what the world does: a router that does not answer, a worker that cannot be
started. Each is counted and told in the log when it begins and when it ends, and the next step
tries again. Without any statistics nothing is decided, so the pools stay as they are.

Does not know: clocks, HTTP, processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from services.planner.actuator import PoolActuator
from services.planner.orders import Order, OrderKind
from services.planner.planner import Decided, Planner
from services.planner.planner_gauges import PlannerGauges
from services.planner.stats_source import StatsSource

logger = logging.getLogger(__name__)


class PlannerLoop:
    """All calls on one thread."""

    def __init__(
        self,
        planner: Planner,
        stats: StatsSource,
        pools: PoolActuator | None,
        gauges: PlannerGauges,
    ) -> None:
        """`pools`: None only tells what it would do, for others to act on."""
        self._planner, self._stats, self._pools, self._gauges = planner, stats, pools, gauges
        self._failing: dict[str, str] = {}
        """Routers, and why they gave nothing the last time."""
        self._is_blind = False
        self.last_step_s: float | None = None
        """When the last step ended."""

    def step(self, now_s: float) -> Decided | None:
        """Unix time. None when nothing could be decided."""
        try:
            return self._step(now_s)
        except Exception:
            # A planner that stops leaves the pools as they are, until nobody remembers why.
            self.failed("decide")
            logger.exception("no decision could be made; trying again")
            return None
        finally:
            self.last_step_s = now_s
            self._gauges.render()

    def failed(self, stage: str) -> None:
        """Count what went wrong outside: read, decide or act."""
        self._gauges.failed(stage)

    def _step(self, now_s: float) -> Decided | None:
        reading = self._stats.read()
        self._gauges.read(len(reading.copies), len(reading.failed))
        self._tell_failures(reading.failed, len(reading.copies))
        workers = None if self._pools is None else self._pools.workers()
        decided = self._planner.decide(now_s, reading.copies, workers)
        if decided is not None and self._pools is not None:
            for order in decided.orders:
                self._give(self._pools, order)
        return decided

    def _give(self, pools: PoolActuator, order: Order) -> None:
        try:
            if order.kind is OrderKind.START:
                pools.start(order.role)
            elif order.kind is OrderKind.DRAIN:
                pools.drain(order.worker)
            else:
                pools.change_role(order.worker, order.role)
        except Exception:
            self.failed("act")
            logger.exception("%s %s failed", order.kind.value, order.worker or order.role.value)

    def _tell_failures(self, failed: Mapping[str, str], num_copies: int) -> None:
        """Each once when it begins, and once when it is over."""
        for place, reason in failed.items():
            if place not in self._failing:
                logger.warning("no statistics from %s: %s", place, reason)
        for place in self._failing.keys() - failed.keys():
            logger.info("statistics from %s again, or it is gone", place)
        self._failing = dict(failed)
        if not num_copies and not self._is_blind:
            logger.warning("no router gives statistics: the pools stay as they are")
        elif num_copies and self._is_blind:
            logger.info("%d routers give statistics", num_copies)
        self._is_blind = not num_copies
