"""Settings of admission: how much may wait, and how strictly predictions are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.core.errors import ConfigError
from baton.settings import check_positive


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """The queue in front of all workers."""

    max_queued_requests: int = 4096
    """Waiting here, of all tenants of one model. When it is full, the tenant that has most waiting
    for its weight gives way."""
    max_queued_tokens: int = 64_000_000
    """Work waiting here, in the tokens that fairness counts."""
    max_tenant_requests: int = 0
    """Waiting here of one tenant; 0 leaves it to the bounds for all."""
    max_tenant_tokens: int = 0
    """Likewise in tokens of work."""
    max_ahead_s: float = 0.5
    """A request leaves the queue only for a worker with at most this much prefill work of others
    ahead of it: more would be served in the order of the worker, not by fairness; less would
    leave the worker idle between two load reports. Half the tightest TTFT target if that is
    less."""
    shed_ratio: float = 0.85
    """After a rejection, requests are taken on only while they are predicted to need at most this
    share of their target, so that the platform settles below its limit and does not swing round
    it."""
    calm_s: float = 5.0
    """Without a rejection for this long, the whole target counts again."""
    quantum_tokens: int = 512
    """What each waiting tenant is credited in one round, times its weight. Smaller is fairer over
    short times and costs more rounds."""
    output_token_cost: float = 2.0
    """Work of one output token, in prompt tokens: it holds its place in a decode batch for a whole
    step, while a prompt's tokens share theirs."""
    residency_tokens: int = 32768
    """Context at which a token generated counts twice, for the KV memory and bandwidth it holds."""
    expected_output_tokens: int = 256
    """Output length assumed for fairness until requests have shown theirs."""
    max_retry_after_s: float = 60.0
    """Clients are not sent away for longer than this at a time."""

    def __post_init__(self) -> None:
        check_positive(
            "admission", self, "max_queued_requests", "max_queued_tokens", "max_ahead_s",
            "calm_s", "quantum_tokens", "residency_tokens", "expected_output_tokens",
            "max_retry_after_s",
        )  # fmt: skip
        for name in ("max_tenant_requests", "max_tenant_tokens", "output_token_cost"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"admission.{name} must be a number from 0 on, got {value}")
        if not 0 < self.shed_ratio <= 1:
            raise ConfigError(
                f"admission.shed_ratio must be above 0 and at most 1, got {self.shed_ratio}"
            )
