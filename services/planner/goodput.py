"""The highest rate at which a cluster still keeps its objective, by simulating it.

Does not know: which clusters are worth a try.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from services.planner.objective import Attainment, Objective, Reached, attainment, reached
from services.planner.workload import Workload

MIN_REQUESTS = 400
MAX_REQUESTS = 20_000
SPAN_S = 40.0
"""Of virtual time at least, so that a queue that grows is seen to grow."""
LOWEST_RATE = 1e-3
"""Requests that hardly ever meet: what is missed here is missed at any rate."""
NUM_LONELY = 20


@dataclass(frozen=True, slots=True)
class Point:
    """What came of one rate, in requests per second."""

    rate_per_s: float
    attainment: Attainment
    reached: Reached


@dataclass(frozen=True, slots=True)
class Goodput:
    rate_per_s: float
    """0 when even one request at a time misses the objective."""
    points: tuple[Point, ...]
    """All that was tried, by rate."""
    limit: str
    """What is missed first above it: `ttft`, `itl`, or `none` within what was tried."""

    @property
    def lonely(self) -> Point | None:
        """With one request at a time; None where a higher rate was met."""
        first = self.points[0] if self.points else None
        return first if first is not None and first.rate_per_s == LOWEST_RATE else None


@dataclass(slots=True)
class GoodputSearch:
    """Rates are tried in a doubling walk and then by halving the gap, to `tolerance`."""

    workload: Workload
    objective: Objective
    seed: int = 0
    tolerance: float = 0.03
    min_requests: int = MIN_REQUESTS
    """Of each simulation; fewer are faster and say less about the tail."""
    span_s: float = SPAN_S
    _points: dict[float, Point] = field(default_factory=dict)

    def run(self, config: ClusterConfig, start_rate: float) -> Goodput:
        """`start_rate`: a guess; a good one saves runs."""
        self._points = {}
        low, high = self._bracket(config, start_rate)
        while low > LOWEST_RATE and high - low > self.tolerance * low:
            middle = (low + high) / 2
            if self._is_met(config, middle):
                low = middle
            else:
                high = middle
        points = tuple(self._points[rate] for rate in sorted(self._points))
        return Goodput(low if low > LOWEST_RATE else 0.0, points, self._limit(high))

    def _bracket(self, config: ClusterConfig, rate: float) -> tuple[float, float]:
        """A rate that is met, and a higher one that is not."""
        if self._is_met(config, rate):
            while self._is_met(config, rate * 1.5):
                rate *= 1.5
            return rate, rate * 1.5
        if not self._is_met(config, LOWEST_RATE):
            return LOWEST_RATE, LOWEST_RATE
        while not self._is_met(config, rate / 2):
            rate /= 2
        return rate / 2, rate

    def _is_met(self, config: ClusterConfig, rate: float) -> bool:
        point = self._points.get(rate) or self._try(config, rate)
        self._points[rate] = point
        return point.attainment.meets(self.objective)

    def _try(self, config: ClusterConfig, rate: float) -> Point:
        num_requests = max(self.min_requests, min(MAX_REQUESTS, int(rate * self.span_s)))
        if rate == LOWEST_RATE:
            num_requests = NUM_LONELY
        arrivals = self.workload.arrivals(rate, num_requests, self.seed)
        outcomes = SimCluster(config).run(arrivals)
        return Point(rate, attainment(outcomes, self.objective), reached(outcomes, self.objective))

    def _limit(self, rate: float) -> str:
        point = self._points.get(rate)
        if point is None or point.attainment.meets(self.objective):
            return "none"
        return "ttft" if point.attainment.ttft < point.attainment.itl else "itl"
