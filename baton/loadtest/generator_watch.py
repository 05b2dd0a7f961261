"""How late the generator itself is: a saturated client measures its own queue.

A tick that the event loop runs late by some time is what a read from a socket may be late by; CPU
seconds of the process against wall seconds say how near the end of its one core it is.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass

import numpy as np

TICK_S = 0.02
LATE_S = 0.010
BUSY_SHARE = 0.85
MAX_TICKS = 1_000_000
MIN_JUDGED_S = 1.0
"""Shorter runs say too little of the generator to warn of it."""


@dataclass(frozen=True, slots=True)
class GeneratorFigures:
    """Of the generator during one run. Seconds."""

    loop_late_p50_s: float
    loop_late_p99_s: float
    cpu_share: float
    """Of one core."""
    lag_p50_s: float | None
    """Of requests behind their planned time; None in a closed loop."""
    lag_p99_s: float | None
    lag_max_s: float | None
    warnings: tuple[str, ...]


class RunClock:
    """Seconds since the start of the run."""

    def __init__(self) -> None:
        self._zero_s = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._zero_s

    def restart(self) -> None:
        self._zero_s = time.perf_counter()


class GeneratorWatch:
    def __init__(self) -> None:
        self._late_s = array("d")
        self._cpu_s = 0.0
        self._wall_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        try:
            while len(self._late_s) < MAX_TICKS:
                before_s = time.perf_counter()
                await asyncio.sleep(TICK_S)
                self._late_s.append(max(0.0, time.perf_counter() - before_s - TICK_S))
        finally:
            self._cpu_s = time.process_time() - cpu_s
            self._wall_s = time.perf_counter() - wall_s

    def figures(self, lags_s: list[float]) -> GeneratorFigures:
        """`lags_s`: of requests that had a planned time."""
        late = np.asarray(self._late_s) if len(self._late_s) else np.zeros(1)
        late_p50, late_p99 = (float(v) for v in np.percentile(late, [50, 99]))
        lag = [float(v) for v in np.percentile(lags_s, [50, 99, 100])] if lags_s else None
        cpu_share = self._cpu_s / self._wall_s if self._wall_s else 0.0
        is_judged = self._wall_s >= MIN_JUDGED_S
        warnings = _warnings(late_p99, cpu_share, lag[1] if lag else None) if is_judged else []
        return GeneratorFigures(
            late_p50,
            late_p99,
            cpu_share,
            lag[0] if lag else None,
            lag[1] if lag else None,
            lag[2] if lag else None,
            tuple(warnings),
        )


def _warnings(late_p99_s: float, cpu_share: float, lag_p99_s: float | None) -> list[str]:
    found = []
    if late_p99_s > LATE_S:
        found.append(
            f"the generator's event loop was up to {1000 * late_p99_s:.0f} ms late (p99): "
            "latencies of that size are its own; give it a core, or a machine, of its own"
        )
    if cpu_share > BUSY_SHARE:
        found.append(
            f"the generator used {cpu_share:.0%} of its core: it was near its limit; share the "
            "load among several of them"
        )
    if lag_p99_s is not None and lag_p99_s > LATE_S:
        found.append(
            f"requests were sent up to {1000 * lag_p99_s:.0f} ms after they were due (p99): the "
            "load was not the one asked for"
        )
    return found
