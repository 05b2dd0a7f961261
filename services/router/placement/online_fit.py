"""Three non-negative coefficients of a duration, learned from one measurement after another. Pure.

    seconds ~ c0 * x0 + c1 * x1 + c2 * x2

Least squares of relative errors with exponential forgetting, solved in normal form: three by three
numbers, whatever was seen. A ridge holds coefficients that the measurements say nothing about (a
slope, while all prompts have one length) at their assumed proportion to the others: the assumed
coefficients times a factor that a median of the first ratios sets and bounded steps follow.

Robust: a measurement far from the expectation counts less, so that its pull is bounded.

Does not know: what is measured.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import islice
from statistics import median

Vector = tuple[float, float, float]

WARM_UP = 7
"""Measurements whose median ratio sets the factor; an outlier among them has no say."""
SCALE_GAIN = 0.03
MAX_SCALE_STEP = math.log(2)
RIDGE = 1.0
"""Weight of the assumed proportions, in measurements of a spread as large as the value."""
MIN_SHARE = 0.02
"""Of what is assumed: nothing is for free, and placement divides by some of them."""
NOISE = 0.2
"""Relative spread of measurements that the ridge is weighed against."""
ERROR_GAIN = 0.02
MAX_ERROR = 4.0
EAGER = 32
"""So many first measurements are taken into account at once, later ones `BATCH` at a time."""
BATCH = 8


class OnlineFit:
    """Learns one function. `version` changes with the coefficients."""

    def __init__(self, assumed: Vector, *, memory: int, outlier_ratio: float) -> None:
        self.coefficients = assumed
        self.num_seen = 0
        self.version = 0
        self.error_ratio = 0.0
        """Mean of |measured - predicted| / predicted, recent ones most."""
        self._assumed = assumed
        self._keep = 1.0 - 1.0 / memory
        self._outlier_ratio = outlier_ratio
        self._log_scale = 0.0
        self._first: list[float] = []
        self._xx = [[0.0] * 3 for _ in range(3)]
        self._xy = [0.0] * 3

    @property
    def scale(self) -> float:
        """How much slower than assumed."""
        return math.exp(self._log_scale)

    def predict(self, x: Vector) -> float:
        return _dot(self.coefficients, x)

    def observe(self, x: Vector, seconds: float) -> None:
        """Take one measurement. What is not a positive number is ignored."""
        if not (seconds > 0 and math.isfinite(seconds)):
            return
        predicted = self.predict(x)
        if not (predicted > 0 and math.isfinite(predicted)):
            return
        self.num_seen += 1
        self._follow_scale(math.log(seconds / (_dot(self._assumed, x))))
        deviation = abs(seconds - predicted) / predicted
        gain = max(ERROR_GAIN, 1.0 / self.num_seen)
        self.error_ratio += gain * (min(deviation, MAX_ERROR) - self.error_ratio)
        expected = _dot(self._assumed, x) * self.scale if self.num_seen <= WARM_UP else predicted
        surprise = abs(seconds - expected) / expected
        weight = min(1.0, self._outlier_ratio / surprise) if surprise else 1.0
        self._add(x, seconds, weight / (NOISE * expected) ** 2)
        if self.num_seen <= EAGER or self.num_seen % BATCH == 0:
            self._solve()

    def _follow_scale(self, log_ratio: float) -> None:
        if len(self._first) < WARM_UP:
            self._first.append(log_ratio)
            self._log_scale = median(self._first)
            return
        step = max(-MAX_SCALE_STEP, min(MAX_SCALE_STEP, log_ratio - self._log_scale))
        self._log_scale += SCALE_GAIN * step

    def _add(self, x: Vector, seconds: float, weight: float) -> None:
        keep, xx, xy = self._keep, self._xx, self._xy
        for i in range(3):
            row, pull = xx[i], weight * x[i]
            for j in range(3):
                row[j] = keep * row[j] + pull * x[j]
            xy[i] = keep * xy[i] + pull * seconds

    def _solve(self) -> None:
        """Coefficients in units of the assumed ones, so that all are of one size."""
        unit = [a * self.scale for a in self._assumed]
        active = [0, 1, 2]
        values = [0.0, 0.0, 0.0]
        while active:
            rows = [
                [self._xx[i][j] * unit[i] * unit[j] + (RIDGE if i == j else 0.0) for j in active]
                for i in active
            ]
            solved = _solve_linear(rows, [self._xy[i] * unit[i] + RIDGE for i in active])
            values = [0.0, 0.0, 0.0]
            for i, value in zip(active, solved, strict=True):
                values[i] = value
            worst = min(active, key=lambda i: values[i])
            if values[worst] >= 0:
                break
            active.remove(worst)
        values = [max(MIN_SHARE, value) for value in values]
        self.coefficients = (values[0] * unit[0], values[1] * unit[1], values[2] * unit[2])
        self.version += 1


class RatioBook:
    """How much slower or faster single workers are than their role's model. Bounded steps."""

    GAIN = 0.05
    SHRINK = 8
    """Measurements that pull a worker's first ratios towards 1."""
    MAX_STEP = math.log(2)
    MAX_LOG = math.log(4)
    MAX_WORKERS = 4096
    """Remembered; the one that was first seen longest ago goes first."""
    RECENT = 64
    """Changes remembered by worker."""

    def __init__(self) -> None:
        self._log: dict[str, float] = {}
        self._ratio: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self.num_changes = 0
        self._changed: deque[str] = deque(maxlen=self.RECENT)

    def get(self, worker_id: str) -> float:
        return self._ratio.get(worker_id, 1.0)

    def changed_since(self, num_changes: int) -> list[str] | None:
        """Workers whose ratio has changed since there were so many changes, some of them named
        twice; None when that is longer ago than is remembered."""
        num_new = self.num_changes - num_changes
        if not 0 <= num_new <= len(self._changed):
            return None
        return list(islice(reversed(self._changed), num_new))

    def observe(self, worker_id: str, seconds: float, predicted_s: float) -> None:
        """`predicted_s`: by the role's model alone."""
        if not (seconds > 0 and predicted_s > 0):
            return
        old, seen = self._log.get(worker_id, 0.0), self._seen.get(worker_id, 0) + 1
        step = max(-self.MAX_STEP, min(self.MAX_STEP, math.log(seconds / predicted_s) - old))
        new = old + step * max(self.GAIN, 1.0 / (seen + self.SHRINK))
        self._log[worker_id] = new = max(-self.MAX_LOG, min(self.MAX_LOG, new))
        self._ratio[worker_id] = math.exp(new)
        self._seen[worker_id] = seen
        self._note_change(worker_id)
        if len(self._seen) > self.MAX_WORKERS:
            oldest = next(iter(self._seen))
            del self._log[oldest], self._ratio[oldest], self._seen[oldest]
            self._note_change(oldest)

    def _note_change(self, worker_id: str) -> None:
        self._changed.append(worker_id)
        self.num_changes += 1


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _solve_linear(rows: list[list[float]], right: Sequence[float]) -> list[float]:
    """Gaussian elimination; the ridge keeps every pivot above zero."""
    size = len(rows)
    m = [[*row, b] for row, b in zip(rows, right, strict=True)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(m[r][i]))
        m[i], m[pivot] = m[pivot], m[i]
        for r in range(i + 1, size):
            factor = m[r][i] / m[i][i]
            for c in range(i, size + 1):
                m[r][c] -= factor * m[i][c]
    solved = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(m[i][c] * solved[c] for c in range(i + 1, size))
        solved[i] = (m[i][size] - rest) / m[i][i]
    return solved
