"""Compiles kernels ahead in worker processes, so that Triton's cache on disk is warm.

Each task launches its kernels once in a process of its own kind; a task that raises, hangs or
takes its process down is noted, and the rest go on in a fresh process. Results are not checked
here. Not known here: what a task does.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

Task = TypeVar("Task")
TASK_LIMIT_S = 90.0
POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of the tasks, by their index."""

    ready: frozenset[int]
    failed: dict[int, str]
    """Index -> why; tasks in neither were not begun."""


def warm_up(
    work: Callable[[Task], None],
    tasks: Sequence[Task],
    *,
    num_jobs: int,
    limit_s: float,
    task_limit_s: float = TASK_LIMIT_S,
) -> Warmed:
    """Run `work` on every task that can be begun within `limit_s`; those under way may end late
    by `task_limit_s`. `work` is a function of a module, and tasks can be pickled.
    """
    return _Pool(work, tasks, num_jobs, limit_s, task_limit_s).run()


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    index: int | None = None
    """Of the task under way."""
    begun_s: float = 0.0


class _Pool(Generic[Task]):
    def __init__(
        self,
        work: Callable[[Task], None],
        tasks: Sequence[Task],
        num_jobs: int,
        limit_s: float,
        task_limit_s: float,
    ) -> None:
        self._work = work
        self._tasks = tasks
        self._context = multiprocessing.get_context("spawn")
        self._num_jobs = min(num_jobs, len(tasks))
        self._end_s = time.monotonic() + limit_s
        self._task_limit_s = task_limit_s
        self._next = 0
        self._ready: set[int] = set()
        self._failed: dict[int, str] = {}

    def run(self) -> Warmed:
        workers = [self._start() for _ in range(self._num_jobs)]
        try:
            while workers:
                for worker in list(workers):
                    if worker.index is None and not self._give(worker):
                        self._stop(worker)
                        workers.remove(worker)
                if workers:
                    wait([w.connection for w in workers], POLL_S)
                workers = [self._look_at(worker) for worker in workers]
        finally:
            for worker in workers:
                self._stop(worker)
        return Warmed(frozenset(self._ready), self._failed)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._work, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _give(self, worker: _Worker) -> bool:
        """Hand out the next task, if there is one and time for it."""
        if self._next >= len(self._tasks) or time.monotonic() >= self._end_s:
            return False
        worker.index, worker.begun_s = self._next, time.monotonic()
        self._next += 1
        worker.connection.send(self._tasks[worker.index])
        return True

    def _look_at(self, worker: _Worker) -> _Worker:
        """The worker, or the one that replaces it."""
        index = worker.index
        assert index is not None
        try:
            if worker.connection.poll():
                error: str | None = worker.connection.recv()
                if error is None:
                    self._ready.add(index)
                    worker.index = None
                    return worker
                # A failed launch may have left its process without a usable device.
                self._failed[index] = error
            elif time.monotonic() - worker.begun_s <= self._task_limit_s:
                return worker
            else:
                self._failed[index] = f"no end within {self._task_limit_s:.0f} s"
        except (EOFError, ConnectionResetError):
            self._failed[index] = "its process died"
        self._stop(worker)
        return self._start()

    def _stop(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.terminate()
        worker.process.join(10)


def _serve(work: Callable[[Task], None], connection: Connection) -> None:
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            work(task)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            connection.send(f"{type(error).__name__}: {lines[0]}"[:160])
        else:
            connection.send(None)
