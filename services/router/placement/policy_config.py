"""Settings of placement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from baton.core.errors import ConfigError
from baton.settings import check_positive


class PolicyName(Enum):
    COST = "cost"
    """The lowest predicted cost; what the other settings are about."""
    RANDOM = "random"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    PREFIX_ONLY = "prefix_only"


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Weights of placement. Costs are in seconds of somebody's waiting; see docs/routing.md."""

    name: PolicyName = PolicyName.COST
    """cost, or one of the policies for comparison: random, round_robin, least_loaded,
    prefix_only."""
    local_prefill_max_tokens: int = 512
    """Prompts with at most this many uncached tokens may be computed on the decode worker itself,
    where that is predicted to be cheaper than a hand-off. A bound on how long its other sequences
    can be held up by one prompt. 0 switches local prefill off where a prefill worker answers."""
    local_prefill_max_queued_tokens: int = 256
    """Not, however, when the decode worker already has more than this to prefill."""
    expected_output_tokens: int = 256
    """Output length assumed where max_tokens allows more: for block needs, and for how long a
    sequence slows down those it decodes with."""
    slowdown_weight: float = 1.0
    """What a second of waiting that a request causes others counts beside a second of its own."""
    work_weight: float = 0.0
    """What a second of prefill work counts beside its place in the queue: those who come later wait
    for it. Above 0, cached prefixes are worth more than the waiting that they save now."""
    shortage_factor: float = 4.0
    """Times over that tokens are computed which a decode worker has no blocks for: it would have
    to preempt."""
    overlap_half_s: float = 30.0
    """With this many seconds of prefill queued on a worker, what it caches counts half, so that a
    hot worker loses its advantage before everybody waits for it. 0 leaves the credit whole."""
    temperature: float = 0.0
    """Spread of a soft-max draw as a share of the best cost; 0 takes the best and draws among equal
    ones only. Several routers with one picture of the cluster would herd otherwise."""
    affinity_s: float = 0.005
    """What a worker that ran the last turn of the same conversation is better by. A hint: the
    index knows what is cached, except for what has just been computed."""
    max_sessions: int = 50_000
    """Conversations remembered for affinity, least recently used ones are forgotten first."""
    min_offer_blocks: int = 2
    """Prefixes of other workers count from this many blocks. A worker that is to compute a prompt
    is also told of one that would not pay by what is known here, if it is this much longer than its
    own: it decides by what it has measured itself."""
    fetch_s: float = 0.002
    """What fetching a prefix costs beside its bytes: two exchanges of messages and a turn of the
    engine on either side."""
    handoff_s: float = 0.003
    """What a hand-off costs beside its bytes: a second submit, a lease, a notice for each chunk."""
    handoff_tail_tokens: int = 512
    """Tokens whose KV is still to be moved when the prompt is computed: a prefill chunk."""
    link_bytes_per_second: float = 1e9
    """Of a link between hosts that no worker has measured: 10 Gbit/s Ethernet."""
    link_latency_s: float = 0.001
    host_link_bytes_per_second: float = 5e9
    """Of an unmeasured link between workers of one host."""
    host_tier_bytes_per_second: float = 5e9
    """At which blocks come back from a worker's host memory."""
    disk_tier_bytes_per_second: float = 1e9
    """At which they come back from its directory."""

    def __post_init__(self) -> None:
        check_positive(
            "policy", self, "expected_output_tokens", "min_offer_blocks", "max_sessions",
            "handoff_tail_tokens",
        )  # fmt: skip
        for name in _RATES:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"policy.{name} must be above 0 bytes a second, got {value:g}")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ConfigError(f"policy.{name} must be between 0 and {limit:g}, got {value:g}")


_RATES = (
    "link_bytes_per_second",
    "host_link_bytes_per_second",
    "host_tier_bytes_per_second",
    "disk_tier_bytes_per_second",
)
_LIMITS: dict[str, float] = {
    "local_prefill_max_tokens": 1_000_000,
    "local_prefill_max_queued_tokens": 1_000_000,
    "slowdown_weight": 100.0,
    "work_weight": 100.0,
    "shortage_factor": 1000.0,
    "overlap_half_s": 3600.0,
    "temperature": 10.0,
    "affinity_s": 60.0,
    "fetch_s": 10.0,
    "handoff_s": 10.0,
    "link_latency_s": 10.0,
}
