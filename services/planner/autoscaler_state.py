"""What an autoscaler remembers from decision to decision, as plain values.

Kept in the decision log: a planner that starts again goes on where the last one was, and a decision
can be made once more from what was known then.

Does not know: how it comes about.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ForecastState:
    """Of `ArrivalForecast`. Times in seconds, rates per second."""

    level: float
    slope: float
    first_s: float
    last_s: float | None
    recent_s: tuple[float, ...]
    recent_rates: tuple[float, ...]
    """One for each of `recent_s`."""
    steady_s: tuple[float, ...]
    steady_rates: tuple[float, ...]
    """One for each of `steady_s`."""
    bins: tuple[float | None, ...]
    """Of a season; None for those not seen yet."""


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """Of one pool: what it needed within the window, and by how much its model was too bold."""

    needed_s: tuple[float, ...]
    needed: tuple[int, ...]
    """One for each of `needed_s`, falling."""
    margin: float
    margin_s: float | None
    last_desired: int


@dataclass(frozen=True, slots=True)
class AutoscalerState:
    arrivals: ForecastState
    prefill: PoolMemory
    decode: PoolMemory
