"""One thread that runs jobs in order, and low-priority work in between.

It sleeps while there is neither. A daemon: a job that hangs in the kernel (a dead network drive)
does not keep the process from ending. Not known here: what the jobs do.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from baton.core.errors import Unavailable

logger = logging.getLogger(__name__)
T = TypeVar("T")

FAILURE_PAUSE_S = 10.0
"""After low-priority work raised, before it is tried again."""


class JobThread:
    """Methods are called from any thread."""

    def __init__(self, name: str, *, work: Callable[[], float | None] | None = None) -> None:
        """`work` does one small piece and returns after how many seconds it is to be called again;
        None: not until `wake` or the end of a job."""
        self._name = name
        self._work = work
        self._wait_s: float | None = 0.0
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` after the jobs before it. Raises Unavailable once stopping."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changed:
            if self._is_stopping:
                raise Unavailable(f"the {self._name} thread has stopped")
            self._jobs.append(run)
            self._changed.notify()
        return future

    def wake(self) -> None:
        """There is something for `work`."""
        with self._changed:
            self._wait_s = 0.0
            self._changed.notify()

    def stop(self) -> None:
        """End after the jobs that are queued; `join` waits for it."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; False when it hangs and is left to itself."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the %s thread did not end within %g s", self._name, timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not (self._jobs or self._is_stopping or self._wait_s == 0.0):
                    self._changed.wait(self._wait_s)
                if self._is_stopping and not self._jobs:
                    return
                job = self._jobs.popleft() if self._jobs else None
                # A `wake` that comes from here on counts for the next round.
                self._wait_s = None
            wait_s: float | None = 0.0
            if job is not None:
                job()
                del job
            else:
                wait_s = self._do_work()
            with self._changed:
                if self._wait_s is None:
                    self._wait_s = wait_s

    def _do_work(self) -> float | None:
        if self._work is None:
            return None
        try:
            return self._work()
        except Exception:
            logger.exception("%s: low-priority work failed", self._name)
            return FAILURE_PAUSE_S
