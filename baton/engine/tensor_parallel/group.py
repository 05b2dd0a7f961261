"""The other ranks of a group as rank 0 sees them: started, told each step, watched, ended.

start: processes ─► all have loaded their libraries ─► (rank 0 and they connect, load) ─► all ready
lost:  a rank ends, fails or hangs ─► all are killed, the communicator is aborted, everyone is told
close: end of stream ─► ranks end by themselves ─► SIGKILL to those that do not

One thread starts the processes, reads what they say and watches them for as long as they live
(`watcher`); the others only read its findings. A group that has lost one rank is lost as a whole:
the ranks are out of step, so its worker is to be started again.

Not known here: tensors, devices, what a step computes.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import TypeVar

from baton.core.errors import BatonError, ConfigError, Unavailable
from baton.engine.batch import SequenceSlice
from baton.engine.config import EngineConfig
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel.messages import Phase, RankSpec, SharedPool, Step, describe
from baton.engine.tensor_parallel.rank_service import RankServiceSpec
from baton.engine.tensor_parallel.rendezvous import path_of
from baton.engine.tensor_parallel.step_clock import StepCount
from baton.engine.tensor_parallel.watcher import RankWatcher

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT_S = 120.0
"""For a process to start and load its libraries on a busy machine, and for the ranks to meet."""
START_TIMEOUT_S = 1800.0
"""For loading weights and preparing, beyond what rank 0 itself took."""
CAUSE_TIMEOUT_S = 2.0
"""How long an error of rank 0's own may turn out to be the loss of another rank."""
ABANDON_TIMEOUT_S = 1.0
"""For a call of rank 0 that waits for a lost rank to end, once it is interrupted."""


@dataclass(frozen=True, slots=True)
class GroupFailure:
    """Why the group is lost; the first cause stands."""

    reason: str
    is_config: bool

    def error(self) -> BatonError:
        return ConfigError(self.reason) if self.is_config else Unavailable(self.reason)


class RankGroup:
    """Ranks 1 to tp_size - 1. `start` once, `close` once; see the header for threads."""

    def __init__(
        self,
        config: EngineConfig,
        service: RankServiceSpec | None = None,
        *,
        num_scratch_blocks: int = 0,
    ) -> None:
        """`service` runs in each of the other ranks' processes beside the steps."""
        self._config = config
        self.num_scratch_blocks = num_scratch_blocks
        """Of every rank's pool, behind the engine's blocks."""
        self._service = service
        self._changed = threading.Condition()
        self._phases = dict.fromkeys(range(1, config.tp_size), Phase.STARTED)
        self._failure: GroupFailure | None = None
        self._listeners: list[Callable[[str], None]] = []
        self._is_closing = False
        self._steps = StepCount()
        # A file without a name: nothing is left of it, however the ranks end.
        self._rendezvous_fd = os.memfd_create("baton-ranks", os.MFD_CLOEXEC)
        specs = [self._spec(rank) for rank in self._phases]
        self._watcher = RankWatcher(specs, self._steps, config.rank_timeout_s, self)

    @property
    def size(self) -> int:
        """With rank 0."""
        return self._config.tp_size

    @property
    def rendezvous(self) -> Path:
        """The file in which rank 0 meets the others, see `Communicator.connect`."""
        return path_of(self._rendezvous_fd)

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2, ..."""
        return [process.pid for process in self._watcher.processes]

    @property
    def failure(self) -> GroupFailure | None:
        return self._failure

    @property
    def call_timeout_s(self) -> float:
        """Bound on a collective call, for the case that nobody watches any more."""
        return max(CONNECT_TIMEOUT_S, 2 * self._config.rank_timeout_s)

    def start(self) -> None:
        """Returns at once."""
        self._watcher.start()

    def wait_until_started(self) -> None:
        """Returns when all ranks are about to connect. Raises ConfigError or Unavailable."""
        self._wait_for(Phase.CONNECTING, CONNECT_TIMEOUT_S)

    def wait_until_ready(self) -> None:
        """Returns when all ranks wait for steps. Raises ConfigError or Unavailable."""
        self._wait_for(Phase.READY, START_TIMEOUT_S)

    def unless_lost(self, work: Callable[[], T], interrupt: Callable[[], None]) -> T:
        """What `work` returns or raises, from a thread of its own; `check` once the group is lost.

        For calls that wait for other ranks and cannot be ended: `interrupt` is to make `work`
        raise, and what still goes on is left behind. The thread ends with its process.
        """
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        thread = threading.Thread(target=run, name="meeting ranks", daemon=True)
        thread.start()
        with self._changed:
            self._changed.wait_for(lambda: outcome.done() or self._failure is not None)
        if self._failure is not None:
            interrupt()
            thread.join(ABANDON_TIMEOUT_S)
            self.check()
        return outcome.result()

    def take_service_sockets(self) -> list[socket.socket]:
        """To the services of ranks 1, 2, ..., for the caller to close. Once, when all are ready.

        A socket's stream ends when the rank's process does.
        """
        return [process.service.dup() for process in self._watcher.processes]

    def share_pool(self, fd: int, num_bytes: int) -> None:
        """Hand every rank the memory of the KV pool. `fd` may be closed after."""
        try:
            for process in self._watcher.processes:
                process.connection.send(SharedPool(num_bytes))
                send_handle(process.connection, fd, process.pid)
        except OSError as error:
            raise self.lost(error) from error

    def _wait_for(self, phase: Phase, timeout_s: float) -> None:
        def is_over() -> bool:
            return self._failure is not None or min(self._phases.values()) >= phase

        with self._changed:
            in_time = self._changed.wait_for(is_over, timeout_s)
            late = sorted(rank for rank, seen in self._phases.items() if seen < phase)
        if not in_time:
            self.fail(f"rank {late[0]} was not {phase.name.lower()} within {timeout_s:g} s")
        self.check()

    def check(self) -> None:
        """Raises ConfigError or Unavailable once the group is lost."""
        if self._failure is not None:
            raise self._failure.error()

    def send_step(self, slices: tuple[SequenceSlice, ...], *, num_threads: int) -> None:
        """Let all ranks run a step; `step_ended` is due for it. Raises Unavailable."""
        self.check()
        data = pickle.dumps(Step(num_threads, slices), pickle.HIGHEST_PROTOCOL)
        self._steps.num_sent += 1
        try:
            for process in self._watcher.processes:
                process.connection.send_bytes(data)
        except OSError as error:
            raise self.lost(error) from error

    def step_ended(self) -> None:
        """The oldest step that was sent is over on rank 0."""
        self._steps.num_ended += 1

    def lost(self, error: Exception) -> BatonError:
        """What to raise for an exception of rank 0 in the middle of a step.

        The group is lost in any case; the cause may be another rank's end, which is noticed at
        about the same time.
        """
        with self._changed:
            is_known = self._changed.wait_for(lambda: self._failure is not None, CAUSE_TIMEOUT_S)
        if not is_known:
            logger.error("rank 0 failed", exc_info=error)
        self.fail(f"rank 0 of {self.size} failed: {describe(error)}")
        assert self._failure is not None
        return self._failure.error()

    def on_failure(self, listener: Callable[[str], None]) -> None:
        """Call `listener(reason)` once the group is lost, on any thread, now if it already is."""
        with self._changed:
            self._listeners.append(listener)
            failure = self._failure
        if failure is not None:
            _tell(listener, failure.reason)

    def fail(self, cause: str, *, is_config: bool = False) -> None:
        """The group is lost, unless it already is or is being closed: end it, tell everyone."""
        with self._changed:
            if self._failure is not None:
                return
            reason = f"the tensor-parallel group of {self.size} ranks is lost: {cause}"
            self._failure = GroupFailure(cause if is_config else reason, is_config)
            is_news = not self._is_closing
            listeners = list(self._listeners)
            self._changed.notify_all()
        self._watcher.kill()
        if is_news:
            logger.error("%s", reason)
            for listener in listeners:
                _tell(listener, reason)

    def reached(self, rank: int, phase: Phase) -> None:
        """See `watcher.Observer`."""
        with self._changed:
            self._phases[rank] = phase
            self._changed.notify_all()

    def close(self) -> None:
        """End the ranks and wait for them, a few seconds at most. No step may be running."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
        self._watcher.close()
        os.close(self._rendezvous_fd)

    def _spec(self, rank: int) -> RankSpec:
        return RankSpec(
            config=self._config,
            parallel=Parallel(rank, self.size),
            root_pid=os.getpid(),
            rendezvous_fd=self._rendezvous_fd,
            call_timeout_s=self.call_timeout_s,
            log_level=logger.getEffectiveLevel(),
            num_scratch_blocks=self.num_scratch_blocks,
            service=self._service,
        )


def _tell(listener: Callable[[str], None], reason: str) -> None:
    try:
        listener(reason)
    except Exception:
        # The others are to be told all the same, and the caller has a group to end.
        logger.exception("a listener failed on: %s", reason)
