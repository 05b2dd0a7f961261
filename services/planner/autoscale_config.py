"""Settings of the autoscaler."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How far one pool may grow and shrink."""

    min_workers: int = 1
    max_workers: int = 8
    devices_per_worker: int = 1

    def __post_init__(self) -> None:
        if self.max_workers < 1:
            raise ConfigError(f"max_workers must be at least 1, got {self.max_workers}")
        if not 0 <= self.min_workers <= self.max_workers:
            raise ConfigError(
                f"min_workers {self.min_workers} must be from 0 to max_workers {self.max_workers}; "
                "lower it or raise max_workers"
            )
        if self.devices_per_worker < 1:
            raise ConfigError(
                f"devices_per_worker must be at least 1, got {self.devices_per_worker}"
            )


@dataclass(frozen=True, slots=True)
class AutoscaleConfig:
    """What is kept, and how boldly."""

    ttft_s: float
    itl_s: float
    share: float = 0.9
    """Of requests that are to keep each target."""
    max_devices: int = 16
    """Both pools together."""
    prefill: PoolLimits = field(default_factory=PoolLimits)
    decode: PoolLimits = field(default_factory=PoolLimits)
    window_s: float = 300.0
    """A pool shrinks only to what would have been enough at every moment of so long."""
    forecast_s: float = 60.0
    """Ahead of which arrivals are predicted at least: until a new worker takes requests."""
    headroom: float = 1.1
    """What is planned for, by what is predicted."""
    shrink_headroom: float = 1.2
    """On top of that, for a pool to shrink: a load at the edge between two sizes would otherwise
    make it go up and down."""
    burst_share: float = 0.5
    """Of the highest rate in the window, kept ready for it to come back."""
    can_change_roles: bool = False
    """Workers may go from one pool to the other without a start, where their sizes are equal."""
    cold_s: float = 30.0
    """After a worker has joined: its first requests say nothing of how many are needed."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s", "window_s", "forecast_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"autoscale.{name} must be above 0 seconds, got {value:g}")
        if not 0 < self.share < 1:
            raise ConfigError(f"autoscale.share must be between 0 and 1, got {self.share:g}")
        for name in ("headroom", "shrink_headroom"):
            if not 1 <= getattr(self, name) <= 10:
                raise ConfigError(
                    f"autoscale.{name} must be from 1 to 10, got {getattr(self, name):g}"
                )
        if not 0 <= self.burst_share <= 1:
            raise ConfigError(
                f"autoscale.burst_share must be from 0 to 1, got {self.burst_share:g}"
            )
        if not self.cold_s >= 0:
            raise ConfigError(f"autoscale.cold_s must not be negative, got {self.cold_s:g}")
        pools = (self.prefill, self.decode)
        one_of_each = sum(pool.devices_per_worker for pool in pools)
        if self.max_devices < one_of_each:
            raise ConfigError(
                f"autoscale.max_devices is {self.max_devices}, but one prefill and one decode "
                f"worker need {one_of_each}: raise it, or serve with one colocated worker and "
                "without an autoscaler"
            )
        least = sum(pool.min_workers * pool.devices_per_worker for pool in pools)
        if least > self.max_devices:
            raise ConfigError(
                f"autoscale.max_devices is {self.max_devices}, but min_workers of both pools need "
                f"{least}; raise it or lower them"
            )
