"""A thread with an event loop for calls that take their time: draining a worker, changing a role.

Does not know: what the calls do. Each has to bound itself; `stop` cancels what still runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class BackgroundLoop:
    """`spawn` from any thread between `start` and `stop`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._thread.start()

    def spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Begin `work`; its exception goes to the log as what failed. After `stop`: nothing."""
        try:
            self._loop.call_soon_threadsafe(self._begin, work, what)
        except RuntimeError:
            # The loop is closed: all ends anyway.
            work.close()

    def stop(self, timeout_s: float) -> None:
        """Cancel what runs; returns when the thread has ended or the time has passed."""
        if not self._thread.is_alive():
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)

    def _begin(self, work: Coroutine[Any, Any, None], what: str) -> None:
        task = self._loop.create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("failed: %s", task.get_name(), exc_info=error)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            self._loop.close()
