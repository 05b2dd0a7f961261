"""Settings of the performance model: what is assumed before anything was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PerfConfig:
    """Where the model starts and how fast it learns.

    The defaults describe an 8-billion-parameter model on one data-centre GPU. Another machine is
    recognised by its first few requests: what is learned first is a factor on all of these.
    """

    prefill_fixed_s: float = 0.005
    """Of a prompt, whatever its length: the engine step that is at work, a launch."""
    prefill_token_s: float = 50e-6
    """Per uncached token."""
    prefill_pair_s: float = 1.5e-9
    """Per uncached token and token before it, of attention: as much as all else at 33,000 tokens of
    context."""
    itl_fixed_s: float = 0.006
    """Of a decode step: reading the weights."""
    itl_sequence_s: float = 50e-6
    """Per sequence in the batch."""
    itl_kv_token_s: float = 30e-9
    """Per token of resident KV that the step reads."""
    memory: int = 500
    """Measurements that the model remembers, older ones fade."""
    outlier_ratio: float = 0.5
    """A measurement further than this share from what was expected pulls no harder than at it."""

    def __post_init__(self) -> None:
        for name in (
            "prefill_fixed_s", "prefill_token_s", "prefill_pair_s", "itl_fixed_s",
            "itl_sequence_s", "itl_kv_token_s",
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"perf.{name} must be above 0 seconds, got {value:g}")
        if not 10 <= self.memory <= 1_000_000:
            raise ConfigError(f"perf.memory must be between 10 and 1000000, got {self.memory}")
        if not 0.05 <= self.outlier_ratio <= 10:
            raise ConfigError(
                f"perf.outlier_ratio must be between 0.05 and 10, got {self.outlier_ratio:g}"
            )
