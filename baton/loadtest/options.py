"""What a load test does: how requests arrive, which targets count, where it ends.

Checked when made, so that a run that starts can also end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.core.errors import ConfigError

MAX_REQUESTS = 1_000_000
MAX_RATE_PER_S = 100_000.0
MAX_CONCURRENCY = 16_384
MAX_DURATION_S = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Exactly one of three loops: `concurrency` (closed), `rate_per_s` (open), neither (open, at
    the times of the workload). Raises ConfigError."""

    num_requests: int = 100
    """At most; conversations that have begun count as they go."""
    duration_s: float = 3600.0
    """After which nothing more is sent."""
    concurrency: int | None = None
    """Requests at a time."""
    rate_per_s: float | None = None
    """Requests, whatever the answers."""
    burstiness: float = 1.0
    """Squared coefficient of variation of the gaps: 0 is a clock, 1 Poisson, 4 comes in clumps."""
    max_in_flight: int = 4096
    """Of an open loop; what is due beyond it is not sent, and is told."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check("--requests", self.num_requests, 1, MAX_REQUESTS)
        _check("--duration", self.duration_s, 0.001, MAX_DURATION_S)
        _check("--max-in-flight", self.max_in_flight, 1, MAX_CONCURRENCY)
        _check("--burstiness", self.burstiness, 0, 10_000)
        if self.concurrency is not None and self.rate_per_s is not None:
            raise ConfigError(
                "--concurrency is a closed loop and --rate an open one: give one of them "
                "(--max-in-flight bounds an open loop)"
            )
        if self.concurrency is not None:
            _check("--concurrency", self.concurrency, 1, MAX_CONCURRENCY)
        if self.rate_per_s is not None:
            _check("--rate", self.rate_per_s, 0.0001, MAX_RATE_PER_S)


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; None asks for nothing. A request that has failed meets nothing."""

    ttft_s: float | None = None
    itl_s: float | None = None
    """Mean between the tokens of a request."""
    e2e_s: float | None = None
    share: float = 0.9
    """Of all requests, that are to meet all of them."""

    def __post_init__(self) -> None:
        for name in ("ttft", "itl", "e2e"):
            value = getattr(self, f"{name}_s")
            if value is not None:
                _check(f"--{name}", value, 1e-6, 86_400, "seconds")
        _check("--share", self.share, 0, 1)

    @property
    def has_any(self) -> bool:
        return any(value is not None for value in (self.ttft_s, self.itl_s, self.e2e_s))


def _check(option: str, value: float, low: float, high: float, unit: str = "") -> None:
    if low <= value <= high and not math.isnan(value):
        return
    raise ConfigError(
        f"{option} must be between {low:g} and {high:g}{f' {unit}' if unit else ''}, got {value:g}"
    )
