"""The processes of the other ranks: started, listened to and ended by one thread of rank 0.

    start ─► what each rank says, until the first of them ends ─► SIGKILL to all
    close ─► end of stream ─► ranks end by themselves ─► SIGKILL to those that do not

Not known here: what follows from a loss.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import pickle
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from baton.engine.tensor_parallel.messages import Phase, RankError, RankLog, RankSpec, describe
from baton.engine.tensor_parallel.process import RankProcess
from baton.engine.tensor_parallel.rank_log import write_log
from baton.engine.tensor_parallel.step_clock import StepClock, StepCount

logger = logging.getLogger(__name__)

TICK_S = 0.25
"""How often the thread looks for steps that do not end."""
CAUSE_PAUSE_S = 0.1
"""A lost rank makes others fail; for so long the one that was killed may still show up."""
END_GRACE_S = 1.5
"""For a rank to end by itself once told to; a step in progress cannot be interrupted."""
CLOSE_TIMEOUT_S = 5.0


class Observer(Protocol):
    """Told what is found, on the watching thread."""

    def reached(self, rank: int, phase: Phase) -> None: ...

    def fail(self, cause: str, *, is_config: bool = False) -> None:
        """A rank is lost. Expected to `kill`."""
        ...


class RankWatcher:
    """`start` once, `close` once; `kill` at any time, on any thread."""

    def __init__(
        self, specs: Sequence[RankSpec], steps: StepCount, step_timeout_s: float, observer: Observer
    ) -> None:
        """One of `specs` for each process."""
        self.processes: list[RankProcess] = []
        """Appended to before any rank has said anything."""
        self._specs = specs
        self._steps = steps
        self._step_timeout_s = step_timeout_s
        self._observer = observer
        self._last_words: dict[int, RankError] = {}
        self._is_lost = False
        self._closing_since_s: float | None = None
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def start(self) -> None:
        """Returns at once."""
        self._thread.start()

    def kill(self) -> None:
        """The group is lost. Returns at once."""
        self._is_lost = True
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """End the ranks and wait for them, at most CLOSE_TIMEOUT_S."""
        self._closing_since_s = time.monotonic()
        for process in self.processes:
            process.hang_up()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _watch(self) -> None:
        try:
            self._start_processes()
            living = {process.connection: process for process in self.processes}
            clock = StepClock(self._step_timeout_s, time.monotonic())
            while living and not self._is_lost:
                for connection in multiprocessing.connection.wait(list(living), TICK_S):
                    process = living[connection]  # type: ignore[index]
                    if not self._read(process):
                        del living[process.connection]
                        self._ended(process)
                now_s = time.monotonic()
                if clock.is_overdue(now_s, self._steps):
                    self._observer.fail(self._overdue())
                since_s = self._closing_since_s
                if since_s is not None and now_s > since_s + END_GRACE_S:
                    break
        except Exception as error:
            logger.exception("the ranks cannot be watched any more")
            self._observer.fail(f"its processes cannot be watched: {describe(error)}")
        finally:
            self._end_processes()

    def _start_processes(self) -> None:
        for spec in self._specs:
            process = RankProcess(spec.parallel.tp_rank, (spec.rendezvous_fd,))
            self.processes.append(process)
            process.connection.send(spec)

    def _read(self, process: RankProcess) -> bool:
        """One message; False at the end of the stream."""
        try:
            message = process.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return False
        if isinstance(message, RankLog):
            write_log(process.rank, message)
        elif isinstance(message, RankError):
            self._last_words[process.rank] = message
            logger.error("rank %d failed:\n%s", process.rank, message.traceback)
        else:
            self._observer.reached(process.rank, Phase(message))
        return True

    def _ended(self, process: RankProcess) -> None:
        """A rank's stream has ended, which ends the group unless it is being closed."""
        if self._closing_since_s is not None or self._is_lost:
            return
        time.sleep(CAUSE_PAUSE_S)
        killed = [p for p in self.processes if p.was_killed]
        process = killed[0] if killed else process
        name = f"rank {process.rank} of {len(self.processes) + 1}"
        words = None if killed else self._last_words.get(process.rank)
        if words is not None:
            self._observer.fail(f"{name} failed: {words.message}", is_config=words.is_config)
        else:
            how = process.wait() or "hung up"
            self._observer.fail(f"{name} (process {process.pid}) {how}")

    def _overdue(self) -> str:
        stopped = ", ".join(str(p.rank) for p in self.processes if p.is_stopped)
        return f"a step did not end within {self._step_timeout_s:g} s; " + (
            f"rank {stopped} is stopped by a signal"
            if stopped
            else "raise engine.rank_timeout_s if steps may take that long"
        )

    def _end_processes(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            if process.wait() is None:
                logger.error("rank %d (process %d) does not end", process.rank, process.pid)
            process.connection.close()
            process.service.close()
