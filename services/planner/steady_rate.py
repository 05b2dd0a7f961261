"""The rate of arrivals now, without the noise of few of them. Pure.

Arrivals of one short interval scatter as a Poisson count does: of two expected, five come often.
So the newest intervals are taken together, newest first, until there are `ENOUGH` arrivals or they
reach `STEADY_S` back; but never over a change: where the newer ones differ from the older ones by
more than chance makes them, the newer ones stand alone. A burst is followed at once.

Source: likelihood ratio of two Poisson rates against a common one (Wilks 1938); windows that end
where the mean has changed: Bifet and Gavalda 2007, Learning from Time-Changing Data with Adaptive
Windowing.

Does not know: what is forecast, workers, clocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

STEADY_S = 60.0
ENOUGH = 30.0
"""Arrivals, whose rate is right within about a fifth: what is left of the noise is headroom."""
CHANGED = 10.0
"""Likelihood ratio (twice its logarithm) of a change: a little over three standard deviations."""


class Interval(NamedTuple):
    length_s: float
    num: float
    """Arrivals."""


def steady_rate(intervals: Sequence[Interval]) -> float:
    """Per second; `intervals` of the last `STEADY_S`, oldest first. 0 without any."""
    total_s = sum(interval.length_s for interval in intervals)
    total = sum(interval.num for interval in intervals)
    length_s = num = 0.0
    for interval in reversed(intervals):
        length_s += interval.length_s
        num += interval.num
        if length_s <= 0:
            continue
        is_other = _differ(num, length_s, total - num, total_s - length_s)
        if num >= ENOUGH or is_other:
            break
    return num / length_s if length_s > 0 else 0.0


def _differ(num: float, length_s: float, num_before: float, before_s: float) -> bool:
    """Whether the newer arrivals come at another rate than those before them."""
    total, total_s = num + num_before, length_s + before_s
    if before_s <= 1e-9 or total <= 0:
        return False
    ratio = _surprise(num, total * length_s / total_s)
    ratio += _surprise(num_before, total * before_s / total_s)
    return 2 * ratio > CHANGED


def _surprise(num: float, expected: float) -> float:
    return num * math.log(num / expected) if num > 0 else 0.0
