"""A few threads that take jobs in turn and never keep the process from ending.

A job that never comes back holds its thread; those of `concurrent.futures` would be waited for at
exit. They end when the object is forgotten. Not known here: what the jobs are.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
Job = Callable[[], None]


class DaemonThreads:
    def __init__(self, num_threads: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        for index in range(num_threads):
            threading.Thread(
                target=_work, args=(self._jobs,), name=f"{name}-{index}", daemon=True
            ).start()
        weakref.finalize(self, _end, self._jobs, num_threads)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        return future


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        # Not kept until the next one comes.
        del job


def _end(jobs: queue.SimpleQueue[Job | None], num_threads: int) -> None:
    for _ in range(num_threads):
        jobs.put(None)
