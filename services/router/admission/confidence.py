"""How long to allow for so many events that come by chance, at a mean rate. Pure.

Times of the n-th event of a Poisson process are gamma distributed; its quantiles come from the
cube-root transformation, good to a few per cent from the first event on.

Source: Wilson and Hilferty, "The distribution of chi-square" (1931).
"""

from __future__ import annotations

import math

SURE = 2.326
"""Standard deviations: in 99 of 100 cases the events have come by then."""
IN_DOUBT = -0.674
"""In one of four."""


def events_allowed_for(count: float, confidence: float) -> float:
    """Mean number of events within the time after which `count` of them have come with this
    confidence (in standard deviations)."""
    if count <= 0:
        return 0.0
    root = 1.0 - 1.0 / (9.0 * count) + confidence / (3.0 * math.sqrt(count))
    return count * max(0.0, root) ** 3
