"""Settings: what requests without targets of their own are judged by, for a planner."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PoolStatsConfig:
    """/pool_stats. A planner's targets stand here too, so that attainment is of what it plans for.
    Requests with targets of their own, or of their class, are judged by those."""

    ttft_s: float | None = None
    """From arrival to the first token. None: requests without a target are not judged."""
    itl_s: float | None = None
    """Between tokens, the mean of one request. None: as above."""

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("itl_s", self.itl_s)):
            if value is not None and not 0 < value < 1e6:
                raise ConfigError(
                    f"pool_stats.{name} must be seconds above 0, got {value}; leave it out for "
                    "no target"
                )
