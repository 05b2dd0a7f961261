"""The pools of a system of plain processes, as a planner sees and changes them.

    start()        spawned by the supervisor ─► STARTING ─► in the registry ─► READY
    drain()        DRAINING: told to drain, its requests move or end ─► SIGTERM ─► gone
    change_role()  STARTING in the other pool ─► announced there ─► READY

A worker that does not come up in time, or keeps dying before it ever did, is given up; its pool
then rests before the next is tried, twice as long after every failure. One that drains is never
started again, also when it dies by itself.

Does not know: why anything is done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.core.tls import TlsFiles
from baton.core.worker_info import Role, WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.rpc.channel import open_channel, unreachable_reason
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from services.launch.background import BackgroundLoop
from services.launch.supervisor import Child, Supervisor
from services.planner.actuator import PlannedWorker, WorkerPhase

logger = logging.getLogger(__name__)

ANSWER_MARGIN_S = 5.0
"""Beyond the drain itself, until the worker has answered."""
END_MARGIN_S = 12.0
"""Beyond `drain_s` of the worker's own settings, for a drained one to end after SIGTERM."""
PAUSE_S = 30.0
"""After a worker that did not come up, until its pool is given another."""
MAX_PAUSE_S = 960.0
SETTLED_S = 60.0
"""After a worker that has refused to change its role, until it is asked again: the pool that is
short gets another one meanwhile."""

ChangeRole = Callable[[str, Role, TlsFiles | None], Awaitable[object]]
"""Address, the role it is to have, TLS. Raises BatonError when it stays as it was."""


class Launcher(Protocol):
    """Makes children that are workers."""

    def another(self, role: Role, children: Iterable[Child]) -> Child:
        """One more beside `children`. Raises BatonError when there is no device for it."""
        ...

    def command(self, role: Role, name: str) -> Sequence[str]:
        """That starts a worker of this name in this role."""
        ...


@dataclass(frozen=True, slots=True)
class PoolTimes:
    """How long things may take."""

    drain_s: float
    """For the requests of a worker that is to go; whatever is left then is ended."""
    start_s: float
    """For a new worker to come up."""
    end_s: float
    """For a process to end after SIGTERM."""


@dataclass(slots=True)
class _Pool:
    """Of one role: when to try again after workers that did not come up."""

    pause_s: float = PAUSE_S
    rests_until_s: float = float("-inf")
    last_refusal: str = ""


@dataclass(slots=True)
class _Worker:
    """What is known of one child beside its process."""

    role: Role
    start_by_s: float | None = None
    """Until then its process has to be ready; None once it was."""
    is_draining: bool = False
    next_role: Role | None = None
    settled_until_s: float = float("-inf")
    """Since it has refused to change its role."""
    joined: tuple[int, Role] | None = None
    """Process and role in which it was last seen ready."""
    joined_s: float = float("-inf")
    info: WorkerInfo | None = None
    """As it last announced itself."""


@dataclass(slots=True)
class ProcessPools:
    """Implements PoolActuator. The planner's thread calls it; what takes time runs on `jobs`."""

    supervisor: Supervisor
    launcher: Launcher
    registry: DirectoryRegistry
    jobs: BackgroundLoop
    clock: Clock
    """For what has to happen in time."""
    planner_clock: Clock
    """Of what planners are told."""
    times: PoolTimes
    change: ChangeRole
    tls: TlsFiles | None = None
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _pools: dict[Role, _Pool] = field(default_factory=lambda: {r: _Pool() for r in Role})
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def workers(self) -> Sequence[PlannedWorker]:
        with self._lock:
            registered = self._registered()
            children = self._children()
            self._forget(children)
            return [
                self._seen(child, registered.get(name))
                for name, child in children.items()
                if not self._is_given_up(child, registered.get(name))
            ]

    def start(self, role: Role) -> None:
        with self._lock:
            pool = self._pools[role]
            if self.clock.now() < pool.rests_until_s:
                return
            try:
                child = self.launcher.another(role, self._children().values())
            except BatonError as error:
                self._refuse(pool, str(error))
                return
            pool.last_refusal = ""
            start_by_s = self.clock.now() + self.times.start_s
            self._workers[child.name] = _Worker(role, start_by_s)
            self.supervisor.add(child)
            logger.warning("autoscaler: %s starts", child.name)

    def drain(self, worker_name: str) -> None:
        with self._lock:
            child, worker = self._find(worker_name)
            if child is None or worker is None or worker.is_draining:
                return
            worker.is_draining = True
            self.supervisor.keep_down(child)
            info = self._info_of(child, worker)
        logger.warning("autoscaler: %s drains", worker_name)
        if info is None:
            # It has never taken a request.
            self.supervisor.end(child, within_s=self.times.end_s)
        else:
            self.jobs.spawn(self._drain(child, info), f"drain of {worker_name}")

    def change_role(self, worker_name: str, role: Role) -> None:
        with self._lock:
            child, worker = self._find(worker_name)
            if child is None or worker is None or worker.is_draining:
                return
            info = self._info_of(child, worker)
            if info is None or info.role is role or worker.next_role is not None:
                return
            worker.next_role = role
        logger.warning("autoscaler: %s goes over to %s", worker_name, role.value)
        self.jobs.spawn(self._change(child, worker, info, role), f"role of {worker_name}")

    # What takes time.

    async def _drain(self, child: Child, info: WorkerInfo) -> None:
        try:
            num_ended = await self._ask_to_drain(info)
            if num_ended:
                logger.error(
                    "autoscaler: %s had %d requests left after %g s, which go on elsewhere or end; "
                    "raise autoscale.drain_s",
                    child.name, num_ended, self.times.drain_s,
                )  # fmt: skip
        except grpc.aio.AioRpcError as error:
            reason = await unreachable_reason(error, info.address, self.tls)
            logger.warning("autoscaler: %s could not be drained: %s", child.name, reason)
        finally:
            self.supervisor.end(child, within_s=self.times.end_s)

    async def _ask_to_drain(self, info: WorkerInfo) -> int:
        request = worker_pb2.DrainRequest(timeout_ms=round(self.times.drain_s * 1000))
        async with open_channel(info.address, self.tls) as channel:
            reply = await worker_pb2_grpc.WorkerStub(channel).Drain(
                request, timeout=self.times.drain_s + ANSWER_MARGIN_S
            )
        return int(reply.num_ended)

    async def _change(self, child: Child, worker: _Worker, info: WorkerInfo, role: Role) -> None:
        try:
            await self.change(info.address, role, self.tls)
        except BatonError as error:
            logger.warning("autoscaler: %s keeps its role: %s", child.name, error)
            with self._lock:
                worker.settled_until_s = self.clock.now() + SETTLED_S
        else:
            with self._lock:
                worker.role = role
                # Were it to die, it comes back in its new role.
                child.command = self.launcher.command(role, child.name)
        finally:
            with self._lock:
                worker.next_role = None

    # Called with the lock.

    def _registered(self) -> Mapping[str, WorkerInfo]:
        return {
            entry.info.worker_id: entry.info
            for entry in self.registry.entries()
            if entry.has_process and entry.age_s < entry.ttl_s
        }

    def _children(self) -> dict[str, Child]:
        return {child.name: child for child in self.supervisor.all() if not child.is_front}

    def _forget(self, children: Mapping[str, Child]) -> None:
        for name in self._workers.keys() - children.keys():
            del self._workers[name]
        for name in children.keys() - self._workers.keys():
            # Of the system's start, or as old as it.
            self._workers[name] = _Worker(Role(name.rpartition("-")[0]))

    def _find(self, name: str) -> tuple[Child | None, _Worker | None]:
        children = self._children()
        self._forget(children)
        return children.get(name), self._workers.get(name)

    def _info_of(self, child: Child, worker: _Worker) -> WorkerInfo | None:
        """None before it was ready for the first time. A lapsed registration changes nothing."""
        info = self._registered().get(child.name) or worker.info
        return info if info is not None and info.pid == child.pid else None

    def _seen(self, child: Child, info: WorkerInfo | None) -> PlannedWorker:
        worker = self._workers[child.name]
        if info is not None and info.pid == child.pid:
            worker.role, worker.info = info.role, info
            self._joined(worker, info)
        elif not worker.is_draining:
            if worker.joined is not None and worker.joined[0] != child.pid:
                self._start_over(worker)
            return PlannedWorker(child.name, worker.role, WorkerPhase.STARTING)
        if worker.is_draining:
            return PlannedWorker(child.name, worker.role, WorkerPhase.DRAINING, worker.joined_s)
        if worker.next_role is not None:
            return PlannedWorker(child.name, worker.next_role, WorkerPhase.STARTING)
        is_settled = self.clock.now() < worker.settled_until_s
        return PlannedWorker(
            child.name, worker.role, WorkerPhase.READY, worker.joined_s, is_settled
        )

    def _joined(self, worker: _Worker, info: WorkerInfo) -> None:
        now = (info.pid, info.role)
        if worker.joined == now:
            return
        is_first_look = worker.joined is None and worker.start_by_s is None
        worker.joined = now
        worker.joined_s = float("-inf") if is_first_look else self.planner_clock.now()
        if worker.start_by_s is not None:
            worker.start_by_s = None
            self._pools[info.role] = _Pool()

    def _start_over(self, worker: _Worker) -> None:
        """It has crashed. The supervisor tries for as long as a new one may take, however often."""
        if worker.start_by_s is None:
            worker.start_by_s = self.clock.now() + self.times.start_s

    def _is_given_up(self, child: Child, info: WorkerInfo | None) -> bool:
        """Ends a new worker that is not worth waiting for."""
        worker = self._workers[child.name]
        if worker.start_by_s is None or worker.is_draining:
            return False
        if info is not None and info.pid == child.pid:
            return False
        if child.will_not_start and worker.joined is None:
            reason = f"it exited {child.num_exits} times; the end of its log:\n{child.log_tail()}"
        elif self.clock.now() > worker.start_by_s:
            reason = f"it was not ready within {self.times.start_s:g} s; see {child.log_file}"
        else:
            return False
        pool = self._pools[worker.role]
        pool.rests_until_s = self.clock.now() + pool.pause_s
        worker.is_draining = True
        logger.error(
            "autoscaler: %s is given up, and no %s worker is tried for %g s: %s",
            child.name, worker.role.value, pool.pause_s, reason,
        )  # fmt: skip
        pool.pause_s = min(2 * pool.pause_s, MAX_PAUSE_S)
        self.supervisor.end(child, within_s=self.times.end_s)
        return True

    def _refuse(self, pool: _Pool, reason: str) -> None:
        """Logged once, not every time that the planner asks."""
        if reason != pool.last_refusal:
            pool.last_refusal = reason
            logger.error("autoscaler: %s", reason)
