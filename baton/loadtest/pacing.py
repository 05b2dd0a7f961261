"""When conversations of an open loop begin. Pure: seconds from the start of the run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from baton.core.errors import ConfigError
from baton.loadtest.workload import Conversation


def at_rate(
    conversations: Iterable[Conversation], rate_per_s: float, burstiness: float, seed: int
) -> Iterator[Conversation]:
    """Gaps of a gamma distribution with that mean rate of conversations. `burstiness` is its
    squared coefficient of variation; 0 is a clock. The first comes at once."""
    rng = random.Random(f"{seed}.pacing")
    at_s = 0.0
    for conversation in conversations:
        yield replace(conversation, at_s=at_s)
        at_s += (
            rng.gammavariate(1 / burstiness, burstiness / rate_per_s)
            if burstiness
            else 1 / rate_per_s
        )


def at_own_times(conversations: Iterable[Conversation], speed: float) -> list[Conversation]:
    """From the first one on, that many times as fast. Raises ConfigError where there are none."""
    if not 0 < speed <= 1e6:
        raise ConfigError(f"--speed must be above 0 and at most 1000000, got {speed:g}")
    ordered = list(conversations)
    times = [c.at_s for c in ordered if c.at_s is not None]
    if len(times) != len(ordered):
        raise ConfigError("the workload has no times of its own: say --rate or --concurrency")
    ordered.sort(key=lambda c: c.at_s or 0.0)
    start_s = min(times, default=0.0)
    return [replace(c, at_s=((c.at_s or 0.0) - start_s) / speed) for c in ordered]
