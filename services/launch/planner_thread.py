"""A thread that decides every few seconds, and that nothing else depends on.

A step that raises is logged and tried again at the next interval; one that hangs is told. Serving
goes on in either case, with the pools as they are.

Does not know: what a step does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from baton.core.clock import Clock

logger = logging.getLogger(__name__)

LATE_FACTOR = 6
"""A step that takes so many intervals, and LATE_S at least, is told."""
LATE_S = 30.0


class PlannerThread:
    """Calls `step` every `interval_s` until stopped, whatever happens in it."""

    def __init__(
        self,
        step: Callable[[float], object],
        *,
        clock: Clock,
        interval_s: float,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """`step` gets the time of `clock`. `failed` is told of each that raised."""
        self._step, self._interval_s, self._failed = step, interval_s, failed
        self._clock = clock
        self._late_s = max(LATE_S, LATE_FACTOR * interval_s)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscaler", daemon=True)
        self._began_s: float | None = None
        self._is_told = False

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def is_late(self) -> bool:
        """A step does not come to its end."""
        began_s = self._began_s
        return began_s is not None and time.monotonic() - began_s >= self._late_s

    def tell_if_late(self) -> None:
        """Log it, once."""
        if self.is_late and not self._is_told:
            self._is_told = True
            logger.error(
                "autoscaler: no decision for %g s; the pools stay as they are", self._late_s
            )

    def _run(self) -> None:
        is_failing = False
        while not self._stopping.wait(self._interval_s):
            self._began_s = time.monotonic()
            try:
                self._step(self._clock.now())
            except Exception:
                self._failed()
                if not is_failing:
                    logger.exception("autoscaler: a decision failed; the pools stay as they are")
                is_failing = True
            else:
                is_failing = False
            self._began_s = None
            self._is_told = False
