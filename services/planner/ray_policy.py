"""The autoscaler as Ray Serve's application-level autoscaling policy.

    controller, several times a second ─► SloPolicy(contexts) ─► replicas for both pools
         contexts: statistics of the router's replicas, replicas that run, those that are to run

    autoscaling_policy:
      policy_function: services.planner.ray_policy:SloPolicy
      policy_kwargs: {settings: /etc/baton/planner.yaml}

Lives inside Serve's controller, so a call takes milliseconds, decides once an interval and repeats
itself between, and never raises: without a decision every pool stays as it is. Ray forgets the
policy's memory when its controller starts again; what was learnt is then read from the decision
log, and without one a whole window has to pass before a pool shrinks.

Does not know: how replicas start and drain, Ray's own limits and delays.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from baton.core.errors import BatonError, ConfigError
from baton.core.worker_info import Role
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.decision_log import DecisionLog
from services.planner.metrics_port import MetricsPort
from services.planner.planner import Planner
from services.planner.planner_config import PlannerConfig, load_models, load_planner_config
from services.planner.planner_gauges import PlannerGauges
from services.router.pool_stats import PoolStats

logger = logging.getLogger(__name__)

ROUTER = "Router"
POOLS = {"Prefill": Role.PREFILL, "Decode": Role.DECODE}
"""By the name of the deployment."""
STALE_S = 60.0
"""Statistics of a replica that are older say nothing of now."""


class Reading(Protocol):
    """One value of a series, as Ray keeps it."""

    timestamp: float
    value: float


class DeploymentId(Protocol):
    @property
    def name(self) -> str: ...


class Context(Protocol):
    """What is read of Ray's AutoscalingContext."""

    target_num_replicas: int
    running_replicas: Sequence[object]

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[object, Sequence[Reading]]] | None: ...


Contexts = Mapping[DeploymentId, Context]
Targets = dict[DeploymentId, int]


@dataclass(slots=True)
class Replicas:
    """Since when each replica is there."""

    _joined_s: dict[str, float] = field(default_factory=dict)
    _is_first_look: bool = True

    def look(self, contexts: Contexts, now_s: float) -> list[PlannedWorker]:
        """Those that run, and one for each that is still to come."""
        found: list[PlannedWorker] = []
        for deployment, context in contexts.items():
            role = POOLS.get(deployment.name)
            if role is None:
                continue
            running = [str(replica) for replica in context.running_replicas]
            for name in running:
                joined_s = float("-inf") if self._is_first_look else now_s
                joined_s = self._joined_s.setdefault(name, joined_s)
                found.append(PlannedWorker(name, role, WorkerPhase.READY, joined_s))
            coming = max(0, context.target_num_replicas - len(running))
            found += [
                PlannedWorker(f"{role.value}-to-come-{i}", role, WorkerPhase.STARTING)
                for i in range(coming)
            ]
        self._is_first_look = False
        names = {worker.name for worker in found}
        self._joined_s = {name: at_s for name, at_s in self._joined_s.items() if name in names}
        return found


class SloPolicy:
    """Ray makes one for each deployment of the application and calls it from one thread."""

    def __init__(self, settings: str, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._replicas = Replicas()
        self._targets: dict[str, int] = {}
        self._next_s = float("-inf")
        self._is_failing = False
        self._planner: Planner | None = None
        self._gauges = PlannerGauges()
        self._interval_s = 1.0
        self._config: PlannerConfig | None = None
        self._is_shown = self._is_hidden = False
        try:
            self._config = load_planner_config(file=Path(settings))
            self._open(self._config)
        except BatonError as error:
            # The controller runs more than this: it must not fail with it.
            logger.error("no autoscaling: %s", error)

    def __call__(self, contexts: Contexts) -> tuple[Targets, dict[DeploymentId, dict[str, object]]]:
        """Replicas of both pools, and no state: Ray does not keep it over a restart either."""
        now_s = self._clock()
        if self._planner is not None and now_s >= self._next_s:
            self._next_s = now_s + self._interval_s
            self._show()
            try:
                self._decide(self._planner, contexts, now_s)
                self._is_failing = False
            except Exception:
                self._gauges.failed("decide")
                if not self._is_failing:
                    logger.exception("no decision could be made; the pools stay as they are")
                self._is_failing = True
            self._gauges.render()
        return {
            deployment: self._targets.get(deployment.name, context.target_num_replicas)
            for deployment, context in contexts.items()
            if deployment.name in POOLS
        }, {}

    def _open(self, config: PlannerConfig) -> None:
        log = DecisionLog(config.decisions)
        self._planner = Planner(config.autoscale, load_models(config.models), log, self._gauges)
        self._interval_s = config.interval_s

    def _show(self) -> None:
        """Open the port, as soon as it is free: Ray makes a policy before it drops the one whose
        place it takes, and that one has it until then."""
        if self._is_shown or self._config is None:
            return
        config = self._config
        try:
            port = MetricsPort(
                self._gauges,
                host=config.host,
                port=config.port,
                targets_dir=config.stats.targets_dir,
            )
        except ConfigError as error:
            # Another controller of this host may have it, and decides as well without.
            if not self._is_hidden:
                logger.warning("decisions are not shown to Prometheus: %s", error)
            self._is_hidden = True
            return
        # Ray says nothing to a policy that it drops.
        weakref.finalize(self, port.stop)
        self._is_shown = True
        try:
            port.start()
        except ConfigError as error:
            logger.warning("decisions are not shown to Prometheus: %s", error)

    def _decide(self, planner: Planner, contexts: Contexts, now_s: float) -> None:
        copies = statistics(contexts, now_s)
        self._gauges.read(len(copies), 0)
        if not copies:
            return
        decided = planner.decide(now_s, copies, self._replicas.look(contexts, now_s))
        if decided is not None:
            decision = decided.decision
            self._targets = {
                "Prefill": decision.prefill.desired,
                "Decode": decision.decode.desired,
            }


def statistics(contexts: Contexts, now_s: float) -> dict[str, PoolStats]:
    """The last that each replica of the router has told, unless that is long ago."""
    router = next((c for d, c in contexts.items() if d.name == ROUTER), None)
    if router is None:
        return {}
    numbers: dict[str, dict[str, float]] = {}
    newest_s: dict[str, float] = {}
    for name, by_replica in (router.raw_metrics or {}).items():
        for replica, series in by_replica.items():
            if not series:
                continue
            last = series[-1]
            key = str(replica)
            numbers.setdefault(key, {})[name] = last.value
            newest_s[key] = max(newest_s.get(key, 0.0), last.timestamp)
    copies: dict[str, PoolStats] = {}
    for key, values in numbers.items():
        if now_s - newest_s[key] > STALE_S:
            continue
        try:
            copies[key] = PoolStats.from_numbers(values)
        except ConfigError:
            # Its first reports hold Ray's own numbers alone.
            continue
    return copies
