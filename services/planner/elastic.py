"""A simulated cluster whose pools follow an autoscaler.

    every interval: what was seen ─► scaler ─► desired workers ─► start (ready after start_s) or
                                                                  drain (gone when its last request
                                                                  has ended)

Counts device time from the start of a worker to its end, so that starting and draining are paid
for. Does not know: how a scaler decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.worker_info import Role, WorkerId
from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.outcome import Outcome
from baton.simulator.workload import Arrival
from services.planner.autoscale import Observation, PoolState
from services.planner.demand import Load
from services.planner.objective import Objective, attainment

Scaler = Callable[[Observation, "Ongoing"], tuple[int, int]]
"""Desired prefill and decode workers."""


@dataclass(frozen=True, slots=True)
class Ongoing:
    """Requests in the pools at this moment."""

    num_prefill: int
    num_decode: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment of a run."""

    now_s: float
    rate_per_s: float
    num_prefill: int
    num_decode: int
    """Paid for: starting and draining ones too."""


@dataclass(slots=True)
class _Worker:
    role: Role
    started_s: float
    ready_s: float
    is_draining: bool = False
    ended_s: float | None = None


class ElasticRun:
    """One workload under one scaler; `run` once."""

    def __init__(
        self,
        config: ClusterConfig,
        scaler: Scaler,
        objective: Objective,
        *,
        start_s: float,
        interval_s: float = 10.0,
        devices_per_worker: dict[Role, int] | None = None,
    ) -> None:
        self._cluster = SimCluster(config)
        self._scaler, self._objective = scaler, objective
        self._start_s, self._interval_s = start_s, interval_s
        self._devices = devices_per_worker or dict.fromkeys(Role, 1)
        self._workers = {
            worker_id: _Worker(worker.info.role, 0.0, 0.0)
            for worker_id, worker in self._cluster.workers.items()
        }
        self._outcomes: Sequence[Outcome] = ()
        self._arrivals: Sequence[Arrival] = ()
        self._num_told = 0
        self._open: list[Outcome] = []
        """Arrived, and not over when last looked at."""
        self._next_name = len(self._workers)
        self.samples: list[Sample] = []
        self.device_s = 0.0

    def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Raises AssertionError when something is left over on a worker."""
        self._arrivals = arrivals
        end_s = arrivals[-1].at_s
        tick_s = self._interval_s
        while tick_s < end_s:
            self._cluster.events.at(tick_s, self._tick)
            tick_s += self._interval_s
        outcomes = self._cluster.run(arrivals, on_outcomes=self._keep)
        self._finish()
        return outcomes

    def _keep(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = outcomes

    def _tick(self) -> None:
        now_s = self._cluster.events.now()
        self._retire(now_s)
        seen = self._observe(now_s)
        desired = self._scaler(seen, self._ongoing())
        for role, num in zip((Role.PREFILL, Role.DECODE), desired, strict=True):
            self._follow(role, num, now_s)
        paid = [w.role for w in self._workers.values() if w.ended_s is None]
        self.samples.append(
            Sample(now_s, seen.load.rate_per_s, paid.count(Role.PREFILL), paid.count(Role.DECODE))
        )

    # What is seen.

    def _observe(self, now_s: float) -> Observation:
        first = self._num_told
        while self._num_told < len(self._arrivals) and self._arrivals[self._num_told].at_s <= now_s:
            self._open.append(self._outcomes[self._num_told])
            self._num_told += 1
        new = self._arrivals[first : self._num_told]
        over = [o for o in self._open if _is_over(o, self._arrivals[o.number])]
        self._open = [o for o in self._open if not _is_over(o, self._arrivals[o.number])]
        ended = [o for o in over if o.refused_s is None]
        reached = attainment(ended, self._objective)
        return Observation(
            now_s,
            _load(new, self._interval_s),
            len(ended),
            reached.ttft if ended else None,
            reached.itl if ended else None,
            self._state(Role.PREFILL, now_s),
            self._state(Role.DECODE, now_s),
        )

    def _state(self, role: Role, now_s: float) -> PoolState:
        mine = [w for w in self._workers.values() if w.role is role and w.ended_s is None]
        going = [w for w in mine if not w.is_draining]
        ready = [w for w in going if w.ready_s <= now_s]
        return PoolState(
            num_ready=len(ready),
            num_starting=len(going) - len(ready),
            num_draining=len(mine) - len(going),
            last_joined_s=max((w.ready_s for w in ready), default=float("-inf")),
        )

    def _ongoing(self) -> Ongoing:
        num = dict.fromkeys(Role, 0)
        for worker in self._cluster.workers.values():
            load = worker.engine.load()
            num[worker.info.role] += load.num_running + load.num_waiting
        return Ongoing(num[Role.PREFILL], num[Role.DECODE])

    # What is done.

    def _follow(self, role: Role, desired: int, now_s: float) -> None:
        going = [
            worker_id for worker_id, w in self._workers.items()
            if w.role is role and not w.is_draining and w.ended_s is None
        ]  # fmt: skip
        for _ in range(desired - len(going)):
            name = f"{role.value[0]}{self._next_name}"
            self._next_name += 1
            self._workers[WorkerId(name)] = _Worker(role, now_s, now_s + self._start_s)
            self._cluster.events.after(self._start_s, lambda name=name: self._join(name))  # type: ignore[misc]
        # The youngest go first: those that have not even started cost nothing to give up.
        for worker_id in going[::-1][: max(0, len(going) - desired)]:
            self._drain(worker_id, now_s)

    def _join(self, name: str) -> None:
        worker = self._workers[WorkerId(name)]
        if worker.ended_s is None:
            self._cluster.add_worker(name, worker.role)

    def _drain(self, worker_id: WorkerId, now_s: float) -> None:
        worker = self._workers[worker_id]
        worker.is_draining = True
        if worker_id in self._cluster.workers:
            self._cluster.drain_worker(worker_id)
        else:
            worker.ended_s = now_s

    def _retire(self, now_s: float) -> None:
        for worker_id, worker in self._workers.items():
            if not worker.is_draining or worker.ended_s is not None:
                continue
            if self._cluster.workers[worker_id].engine.is_empty:
                self._cluster.remove_worker(worker_id)
                worker.ended_s = now_s

    def _finish(self) -> None:
        end_s = self._cluster.events.now()
        self.device_s = sum(
            self._devices[w.role] * ((end_s if w.ended_s is None else w.ended_s) - w.started_s)
            for w in self._workers.values()
        )


def _is_over(outcome: Outcome, arrival: Arrival) -> bool:
    return outcome.refused_s is not None or outcome.num_output_tokens >= arrival.num_output_tokens


def _load(arrivals: Sequence[Arrival], interval_s: float) -> Load:
    num = len(arrivals)
    if not num:
        return Load(0.0, 1.0, 1.0, 1.0, 1.0)
    prompts = [a.num_prompt_tokens for a in arrivals]
    outputs = [a.num_output_tokens for a in arrivals]
    held = sum(p * o + o * o / 2 for p, o in zip(prompts, outputs, strict=True))
    return Load(
        num / interval_s,
        sum(prompts) / num,
        sum(p * p / 2 for p in prompts) / num,
        sum(outputs) / num,
        # Over the time of its decoding, so long outputs count for longer.
        held / sum(outputs),
    )
