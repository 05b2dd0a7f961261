"""The rate of arrivals to come: level, trend, the same time of earlier days, and bursts. Pure.

Holt's double exponential smoothing gives level and trend; a ring of bins over a season gives the
ratio of that time to the day's mean, once a whole season was seen; the highest rate of the last
window is remembered, since bursts come again.

Does not know: workers, clocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

LEVEL_S = 60.0
"""Time constant of the level."""
TREND_S = 180.0
SEASON_S = 86_400.0
NUM_BINS = 288
BIN_GAIN = 0.3
MAX_TREND_SHARE = 1.0
"""A trend carries at most this share of the level: the straight line ends somewhere."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests per second at the time asked for."""

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
        self._recent.append((now_s, rate_per_s))
        while self._recent and self._recent[0][0] < now_s - self._window_s:
            self._recent.popleft()
        i = self._bin(now_s)
        known = self._bins[i]
        self._bins[i] = rate_per_s if known is None else known + BIN_GAIN * (rate_per_s - known)

    def at(self, time_s: float) -> Forecast:
        """For `time_s`, now or later."""
        if self._last_s is None:
            return Forecast(0.0, 0.0, 1.0, 0.0)
        ahead_s = max(0.0, time_s - self._last_s)
        limit = MAX_TREND_SHARE * self._level
        trend = max(-limit, min(limit, self._slope * ahead_s))
        season = self._season_ratio(time_s)
        highest = max((rate for _, rate in self._recent), default=0.0)
        # The season already says what the straight line would.
        carried = trend if season == 1.0 else 0.0
        return Forecast(self._level, carried, season, self._burst_share * highest)

    def _smooth(self, gap_s: float, rate: float) -> None:
        if gap_s <= 0:
            return
        gain = gap_s / (LEVEL_S + gap_s)
        before = self._level
        expected = before + self._slope * gap_s
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
        return then / now

    def _bin(self, time_s: float) -> int:
        return int(time_s / self._season_s * NUM_BINS) % NUM_BINS
