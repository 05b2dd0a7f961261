"""Who steers the pools of a simulated run: an autoscaler, or somebody who only counts.

Does not know: the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.worker_info import Role
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.autoscale import Autoscaler, Decision, Observation
from services.planner.autoscale_config import AutoscaleConfig
from services.planner.orders import Order, OrderKind, orders


@dataclass(frozen=True, slots=True)
class Ongoing:
    """Requests in the pools at this moment."""

    num_prefill: int
    num_decode: int


Pilot = Callable[[Observation, Ongoing, Sequence[PlannedWorker]], Sequence[Order]]
"""What is to be done now."""


class Following:
    """A pilot that does what an autoscaler decides, and keeps its decisions."""

    def __init__(self, scaler: Autoscaler, config: AutoscaleConfig) -> None:
        self._scaler, self._config = scaler, config
        self.decisions: list[Decision] = []

    def __call__(
        self, seen: Observation, ongoing: Ongoing, workers: Sequence[PlannedWorker]
    ) -> Sequence[Order]:
        decision = self._scaler.decide(seen)
        self.decisions.append(decision)
        return orders(decision, workers, self._config)


def by_count(desired: Callable[[Observation, Ongoing], tuple[int, int]]) -> Pilot:
    """A pilot that starts and drains until there are so many prefill and decode workers."""

    def pilot(
        seen: Observation, ongoing: Ongoing, workers: Sequence[PlannedWorker]
    ) -> Sequence[Order]:
        given: list[Order] = []
        for role, num in zip((Role.PREFILL, Role.DECODE), desired(seen, ongoing), strict=True):
            mine = [w for w in workers if w.role is role and w.phase is not WorkerPhase.DRAINING]
            given += [Order(OrderKind.START, role)] * (num - len(mine))
            # The youngest go first: those that have not even started cost nothing to give up.
            given += [Order(OrderKind.DRAIN, role, w.name) for w in mine[::-1][: len(mine) - num]]
        return given

    return pilot
