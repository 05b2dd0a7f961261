"""A simulated cluster whose pools follow an autoscaler.

    every interval: sums of a router ─► observer ─► pilot ─► orders ─► start (ready after start_s),
                                                                       drain (gone when its last
                                                                       request has ended), or
                                                                       change of role

Observer, state machine and orders are those of a live deployment. Counts device time from the start
of a worker to its end, so that starting and draining are paid for. Where pools have no worker,
requests wait for the first one, or are refused by admission as in service. A worker that changes
its role ends its requests first, and its cache is empty then: live it keeps the cache.

Does not know: how anything is decided.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.worker_info import Role, WorkerId
from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.outcome import Outcome
from baton.simulator.workload import Arrival
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.autoscale import Observation
from services.planner.elastic_stats import RunStats
from services.planner.objective import Objective
from services.planner.observer import Observer
from services.planner.orders import Order, OrderKind
from services.planner.pilots import Ongoing, Pilot
from services.router.pool_stats import PoolMoment

LOOK_S = 0.5
"""Between two looks at workers that are to end."""
ROLE_CHANGE_S = 2.0
"""From a worker's last request in its old role to its first one in the new role."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment of a run."""

    now_s: float
    rate_per_s: float
    num_prefill: int
    num_decode: int
    """Paid for: starting and draining ones too."""
    num_ready_prefill: int = 0
    num_ready_decode: int = 0


@dataclass(frozen=True, slots=True)
class RunOrder:
    """An order that was carried out."""

    now_s: float
    order: Order


@dataclass(slots=True)
class _Worker:
    role: Role
    started_s: float
    ready_s: float
    sim_id: WorkerId
    """In the cluster; another one after each change of role."""
    is_draining: bool = False
    next_role: Role | None = None
    """While it changes its role."""
    ended_s: float | None = None


class ElasticRun:
    """One workload under one pilot; `run` once."""

    def __init__(
        self,
        config: ClusterConfig,
        pilot: Pilot,
        objective: Objective,
        *,
        start_s: float,
        interval_s: float = 10.0,
        devices_per_worker: dict[Role, int] | None = None,
    ) -> None:
        self._cluster = SimCluster(config)
        self._pilot, self._objective = pilot, objective
        self._start_s, self._interval_s = start_s, interval_s
        self._devices = devices_per_worker or dict.fromkeys(Role, 1)
        self._workers = {
            str(worker_id): _Worker(worker.info.role, 0.0, 0.0, worker_id)
            for worker_id, worker in self._cluster.workers.items()
        }
        self._observer = Observer()
        self._stats = RunStats((), (), objective)
        self._is_looking = False
        self._next_name = len(self._workers)
        self.samples: list[Sample] = []
        self.orders: list[RunOrder] = []
        self.device_s = 0.0

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds in steps, of every worker there was."""
        return {str(name): worker.busy_s for name, worker in self._cluster.workers.items()}

    def run(
        self,
        arrivals: Sequence[Arrival],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        """Raises AssertionError when something is left over on a worker."""

        def begin(outcomes: Sequence[Outcome]) -> None:
            self._stats = RunStats(arrivals, outcomes, self._objective)
            self._observe(0.0)
            self._cluster.events.after(self._interval_s, self._tick)

        outcomes = self._cluster.run(arrivals, progress=progress, on_outcomes=begin)
        self._finish()
        return outcomes

    def _tick(self) -> None:
        now_s = self._cluster.events.now()
        seen = self._observe(now_s)
        if self._stats.is_over:
            return
        assert seen is not None
        for order in self._pilot(seen, self._ongoing(), self._planned()):
            self.orders.append(RunOrder(now_s, order))
            self._carry_out(order, now_s)
        self._sample(now_s, seen)
        self._cluster.events.after(self._interval_s, self._tick)

    # What is seen.

    def _observe(self, now_s: float) -> Observation | None:
        moments = {role: self._moment(role) for role in Role}
        seen = self._observer.observe(
            now_s, {"router": self._stats.at(now_s, moments)}, self._planned()
        )
        return None if seen is None else seen.observation

    def _moment(self, role: Role) -> PoolMoment:
        names = [w.sim_id for w in self._workers.values() if w.role is role and _is_going(w)]
        joined = [self._cluster.workers[name] for name in names if name in self._cluster.workers]
        loads = [worker.engine.load() for worker in joined]
        return PoolMoment(
            num_ready=float(len(loads)),
            kv_usage=sum(load.kv_usage for load in loads) / max(1, len(loads)),
            num_waiting=float(sum(load.num_waiting for load in loads)),
        )

    def _planned(self) -> list[PlannedWorker]:
        now_s = self._cluster.events.now()
        there = [(name, w) for name, w in self._workers.items() if w.ended_s is None]
        return [
            PlannedWorker(
                name, worker.next_role or worker.role, _phase(worker, now_s), _joined(worker)
            )
            for name, worker in there
        ]

    def _ongoing(self) -> Ongoing:
        num = dict.fromkeys(Role, 0)
        for worker in self._cluster.workers.values():
            load = worker.engine.load()
            num[worker.info.role] += load.num_running + load.num_waiting
        return Ongoing(num[Role.PREFILL], num[Role.DECODE])

    def _sample(self, now_s: float, seen: Observation) -> None:
        planned = self._planned()
        paid = [w.role for w in planned]
        ready = [w.role for w in planned if w.phase is WorkerPhase.READY]
        counts = [
            part.count(role) for part in (paid, ready) for role in (Role.PREFILL, Role.DECODE)
        ]
        self.samples.append(Sample(now_s, seen.load.rate_per_s, *counts))

    # What is done.

    def _carry_out(self, order: Order, now_s: float) -> None:
        if order.kind is OrderKind.START:
            self._begin(order.role, now_s)
            return
        worker = self._workers[order.worker]
        if order.kind is OrderKind.CHANGE_ROLE:
            worker.next_role = order.role
        else:
            worker.is_draining = True
        if worker.sim_id in self._cluster.workers:
            self._cluster.drain_worker(worker.sim_id)
            self._look_soon()
        elif worker.is_draining:
            worker.ended_s = now_s

    def _begin(self, role: Role, now_s: float) -> None:
        name = f"{role.value[0]}{self._next_name}"
        self._next_name += 1
        worker = _Worker(role, now_s, now_s + self._start_s, WorkerId(name))
        self._workers[name] = worker
        self._cluster.events.after(self._start_s, lambda: self._join(worker))

    def _join(self, worker: _Worker) -> None:
        if worker.ended_s is None:
            self._cluster.add_worker(worker.sim_id, worker.role)

    def _look_soon(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self._cluster.events.after(LOOK_S, self._look)

    def _look(self) -> None:
        """Workers whose last request has ended leave the cluster."""
        self._is_looking = False
        now_s = self._cluster.events.now()
        leaving = [
            w for w in self._workers.values()
            if not _is_going(w) and w.ended_s is None and w.sim_id in self._cluster.workers
        ]  # fmt: skip
        for worker in leaving:
            if self._cluster.workers[worker.sim_id].engine.is_empty:
                self._cluster.remove_worker(worker.sim_id)
                self._left(worker, now_s)
        if any(w.ended_s is None and w.sim_id in self._cluster.workers for w in leaving):
            self._look_soon()

    def _left(self, worker: _Worker, now_s: float) -> None:
        if worker.is_draining or worker.next_role is None:
            worker.ended_s = now_s
            return
        worker.role, worker.next_role = worker.next_role, None
        worker.sim_id = WorkerId(f"{worker.sim_id}{worker.role.value[0]}")
        worker.ready_s = now_s + ROLE_CHANGE_S
        self._cluster.events.after(ROLE_CHANGE_S, lambda: self._join(worker))

    def _finish(self) -> None:
        end_s = self._cluster.events.now()
        self.device_s = sum(
            self._devices[w.role] * ((end_s if w.ended_s is None else w.ended_s) - w.started_s)
            for w in self._workers.values()
        )


def num_turns(samples: Sequence[Sample], role: Role) -> int:
    """Changes of a pool's direction: from growing to shrinking, or back."""
    values = [s.num_prefill if role is Role.PREFILL else s.num_decode for s in samples]
    moves = [after > before for before, after in itertools.pairwise(values) if before != after]
    return sum(one != other for one, other in itertools.pairwise(moves))


def _is_going(worker: _Worker) -> bool:
    return not worker.is_draining and worker.next_role is None and worker.ended_s is None


def _phase(worker: _Worker, now_s: float) -> WorkerPhase:
    if worker.is_draining:
        return WorkerPhase.DRAINING
    is_ready = worker.next_role is None and worker.ready_s <= now_s
    return WorkerPhase.READY if is_ready else WorkerPhase.STARTING


def _joined(worker: _Worker) -> float:
    return worker.ready_s if worker.ready_s > 0 else float("-inf")
