"""The rate of arrivals to come: level, trend, the same time of earlier days, and bursts. Pure.

Holt's double exponential smoothing gives level and trend; a ring of bins over a season gives the
ratio of that time to the day's mean, once a whole season was seen; the highest rate of the last
window is remembered, since bursts come again. Bins and highest rate are of steady rates: of few
arrivals, an interval with many says little.

Does not know: workers, clocks.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

from services.planner.autoscaler_state import ForecastState
from services.planner.steady_rate import STEADY_S, Interval, steady_rate

LEVEL_S = 60.0
"""Time constant of the level."""
TREND_S = 180.0
SEASON_S = 86_400.0
NUM_BINS = 288
BIN_GAIN = 0.3
MAX_SEASON_RATIO = 10.0
"""No day rises or falls by more until a worker has started: a bin with next to nothing in it says
little."""
MAX_TREND_SHARE = 1.0
"""A trend carries at most this share of the level: the straight line ends somewhere."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests per second at the time asked for."""

    now: float
    """Of the last moments, for as long as they are of one rate."""
    level: float
    trend: float
    """What the trend adds by then."""
    season: float
    """By how much that time differs from now on other days; 1 while no season is known."""
    floor: float
    """Kept ready for a burst to come back."""

    @property
    def rate_per_s(self) -> float:
        return max(0.0, (self.level + self.trend) * self.season, self.floor)


class ArrivalForecast:
    """`observe` in order of time; ask `at`."""

    def __init__(self, *, window_s: float, burst_share: float, season_s: float = SEASON_S) -> None:
        self._window_s, self._burst_share, self._season_s = window_s, burst_share, season_s
        self._level = self._slope = 0.0
        self._last_s: float | None = None
        self._first_s = 0.0
        self._recent: deque[tuple[float, float]] = deque()
        """Time and rate since the time before, of `STEADY_S`."""
        self._steady: deque[tuple[float, float]] = deque()
        """Of the window."""
        self._bins: list[float | None] = [None] * NUM_BINS

    def observe(self, now_s: float, rate_per_s: float) -> None:
        """The mean rate since the last call. Raises ValueError when time goes backwards."""
        if self._last_s is None:
            self._first_s, self._level = now_s, rate_per_s
        else:
            if now_s < self._last_s:
                raise ValueError(f"time went from {self._last_s:g} back to {now_s:g}")
            self._smooth(now_s - self._last_s, rate_per_s)
        self._last_s = now_s
        _remember(self._recent, now_s, rate_per_s, STEADY_S)
        steady = self._steady_rate()
        _remember(self._steady, now_s, steady, self._window_s)
        i = self._bin(now_s)
        known = self._bins[i]
        self._bins[i] = steady if known is None else known + BIN_GAIN * (steady - known)

    def at(self, time_s: float) -> Forecast:
        """For `time_s`, now or later."""
        if self._last_s is None:
            return Forecast(0.0, 0.0, 0.0, 1.0, 0.0)
        ahead_s = max(0.0, time_s - self._last_s)
        limit = MAX_TREND_SHARE * self._level
        trend = max(-limit, min(limit, self._slope * ahead_s))
        season = self._season_ratio(time_s)
        highest = max((rate for _, rate in self._steady), default=0.0)
        # The season already says what the straight line would.
        carried = trend if season == 1.0 else 0.0
        now = self._steady[-1][1] if self._steady else 0.0
        return Forecast(now, self._level, carried, season, self._burst_share * highest)

    def state(self) -> ForecastState:
        return ForecastState(
            self._level,
            self._slope,
            self._first_s,
            self._last_s,
            tuple(at_s for at_s, _ in self._recent),
            tuple(rate for _, rate in self._recent),
            tuple(at_s for at_s, _ in self._steady),
            tuple(rate for _, rate in self._steady),
            tuple(self._bins),
        )

    def restore(self, state: ForecastState) -> None:
        """Raises ValueError when it is of another number of bins."""
        if len(state.bins) != NUM_BINS:
            raise ValueError(f"{len(state.bins)} bins of a season, expected {NUM_BINS}")
        self._level, self._slope = state.level, state.slope
        self._first_s, self._last_s = state.first_s, state.last_s
        self._recent = deque(zip(state.recent_s, state.recent_rates, strict=True))
        self._steady = deque(zip(state.steady_s, state.steady_rates, strict=True))
        self._bins = list(state.bins)

    def _steady_rate(self) -> float:
        """Nobody knows of how long the first rate was."""
        recent = list(self._recent)
        intervals = [
            Interval(at_s - before_s, rate * (at_s - before_s))
            for (before_s, _), (at_s, rate) in itertools.pairwise(recent)
        ]
        if not any(interval.length_s > 0 for interval in intervals):
            return recent[-1][1]
        return steady_rate(intervals)

    def _smooth(self, gap_s: float, rate: float) -> None:
        if gap_s <= 0:
            return
        gain = gap_s / (LEVEL_S + gap_s)
        before = self._level
        # A planner that has not looked for long knows no slope for so long, either.
        limit = MAX_TREND_SHARE * before
        expected = before + max(-limit, min(limit, self._slope * gap_s))
        self._level = max(0.0, expected + gain * (rate - expected))
        slope_gain = gap_s / (TREND_S + gap_s)
        self._slope += slope_gain * ((self._level - before) / gap_s - self._slope)

    def _season_ratio(self, time_s: float) -> float:
        assert self._last_s is not None
        if self._last_s - self._first_s < self._season_s:
            return 1.0
        now, then = self._bins[self._bin(self._last_s)], self._bins[self._bin(time_s)]
        if not now or then is None:
            return 1.0
        return max(1 / MAX_SEASON_RATIO, min(MAX_SEASON_RATIO, then / now))

    def _bin(self, time_s: float) -> int:
        return int(time_s / self._season_s * NUM_BINS) % NUM_BINS


def _remember(
    moments: deque[tuple[float, float]], now_s: float, rate_per_s: float, for_s: float
) -> None:
    moments.append((now_s, rate_per_s))
    while moments[0][0] < now_s - for_s:
        moments.popleft()
