"""Where a planner gets the statistics of router copies from: the seam of its loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.router.pool_stats import PoolStats


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one moment."""

    copies: Mapping[str, PoolStats]
    """By copy."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why a copy, or the search for them, gave nothing."""


class StatsSource(Protocol):
    """Asked on the planner's thread."""

    def read(self) -> Reading:
        """Takes a bounded time. Never raises for what a copy does."""
        ...
