"""What is wanted of a deployment: two targets and the share of requests that must meet each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import ConfigError
from baton.simulator.outcome import Outcome
from services.router.admission.slo import SloTargets


@dataclass(frozen=True, slots=True)
class Objective:
    """TTFT and mean ITL of a request, each met by at least `share` of all requests."""

    ttft_s: float
    itl_s: float
    share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 seconds, got {getattr(self, name):g}")
        if not 0 < self.share < 1:
            raise ConfigError(f"share must be between 0 and 1, got {self.share:g}")


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of requests, 0 to 1. One that never ended, or was refused, met nothing."""

    ttft: float
    itl: float
    both: float

    def meets(self, objective: Objective) -> bool:
        return min(self.ttft, self.itl) >= objective.share


@dataclass(frozen=True, slots=True)
class Reached:
    """What `share` of all requests got at worst; infinite where more than the rest never ended."""

    ttft_s: float
    itl_s: float


def reached(outcomes: Sequence[Outcome], objective: Objective) -> Reached:
    """The tightest targets that would have been met."""
    ended = [outcome for outcome in outcomes if outcome.last_token_s]
    missing = [math.inf] * (len(outcomes) - len(ended))
    ttft = sorted([outcome.ttft_s for outcome in ended] + missing)
    # A single token has no pace to miss.
    itl = sorted([outcome.itl_s or 0.0 for outcome in ended] + missing)
    last = math.ceil(objective.share * len(outcomes)) - 1
    return Reached(ttft[last], itl[last])


def attainment(outcomes: Sequence[Outcome], objective: Objective) -> Attainment:
    """An answer of one token meets any ITL."""
    num_ttft = num_itl = num_both = 0
    targets = SloTargets(objective.ttft_s, objective.itl_s)
    for outcome in outcomes:
        met = outcome.against(targets)
        is_ttft, is_itl = met.is_ttft_met is not False, met.is_itl_met is not False
        num_ttft += is_ttft
        num_itl += is_itl
        num_both += is_ttft and is_itl
    total = max(1, len(outcomes))
    return Attainment(num_ttft / total, num_itl / total, num_both / total)
