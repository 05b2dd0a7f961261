"""Settings of what failures cost: retries of requests, rests for workers that fail them."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import ConfigError
from baton.settings import check_positive


@dataclass(frozen=True, slots=True)
class RetryConfig:
    """How many failed requests may be placed again. Those of a lost worker always may: each of them
    is placed again once, while errors of workers that live would come again and again."""

    budget_ratio: float = 0.2
    """Retries per request, in the long run."""
    budget_reserve: int = 64
    """Retries at hand when there were no failures for a while."""

    def __post_init__(self) -> None:
        check_positive("retry", self, "budget_reserve")
        if not 0 <= self.budget_ratio <= 1:
            raise ConfigError(
                "retry.budget_ratio must be a share of the requests, from 0 to 1, "
                f"got {self.budget_ratio:g}"
            )


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When a worker that fails requests is left alone, though it answers."""

    min_failures: int = 5
    """Fewer within the window never open the breaker."""
    failure_ratio: float = 0.5
    """Share of the requests ended within the window that must have failed."""
    window_s: float = 10.0
    open_s: float = 2.0
    """Until one request is tried on the worker again; doubles with every trial that fails."""
    open_max_s: float = 60.0

    def __post_init__(self) -> None:
        check_positive("breaker", self, "min_failures", "window_s", "open_s", "open_max_s")
        if not 0 < self.failure_ratio <= 1:
            raise ConfigError(
                "breaker.failure_ratio must be a share of the requests, above 0 and up to 1, "
                f"got {self.failure_ratio:g}"
            )
        if self.open_max_s < self.open_s:
            raise ConfigError(
                f"breaker.open_max_s must be at least breaker.open_s ({self.open_s:g}), "
                f"got {self.open_max_s:g}"
            )
