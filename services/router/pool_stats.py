"""What one router copy tells a planner: sums since its start, and how the pools are at this moment.

Sums, so that nobody minds how often they are asked for: who asks twice subtracts. Everything is a
plain number under a flat name, as JSON and Ray's autoscaling metrics have it.

Does not know: who asks, what is planned, other copies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from baton.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolMoment:
    """One pool as this copy sees it now; every copy sees the same workers."""

    num_ready: float = 0.0
    """Workers that take new requests."""
    num_draining: float = 0.0
    """Workers that go on with what they have and take no more."""
    kv_usage: float = 0.0
    """Mean share of KV memory that ready workers hold for live requests, 0 to 1."""
    num_waiting: float = 0.0
    """Requests that wait on workers for their first step."""
    youngest_s: float = 0.0
    """Since the last worker became ready; since this copy's start for those it found."""


@dataclass(frozen=True, slots=True)
class PrefillSums:
    """Of prompts that prefill workers computed, undisturbed by failures and moves."""

    num: float = 0.0
    tokens: float = 0.0
    """Computed."""
    pairs: float = 0.0
    """Token and token before it."""
    engine_s: float = 0.0
    """Device-seconds: each prompt's share of its steps, times the ranks of its worker."""


@dataclass(frozen=True, slots=True)
class DecodeSums:
    """Of requests that decode workers generated, undisturbed by failures and moves: each one's mean
    step counts once."""

    num: float = 0.0
    batch: float = 0.0
    """Sequences of the step."""
    kv_tokens: float = 0.0
    """That they held together."""
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts are floats, since they may come as means of several readings."""

    uptime_s: float
    """Of this copy. Lower than before: another process."""
    ttft_target_s: float = 0.0
    """That requests without one of their own are judged by; 0: they are not judged."""
    itl_target_s: float = 0.0
    num_arrived: float = 0.0
    """Requests that came as far as admission, refused ones too: what was asked for."""
    num_refused: float = 0.0
    """Of these, sent away for want of room."""
    num_prompts: float = 0.0
    """Whose prompt a worker took up; the sums of prompts are over them."""
    uncached_tokens: float = 0.0
    pairs: float = 0.0
    """Token and token before it, of tokens that were not cached."""
    num_ended: float = 0.0
    """That generated something; the sums of outputs are over them."""
    output_tokens: float = 0.0
    held_tokens: float = 0.0
    """Context in tokens, times the tokens for which it was held."""
    ttft_met: float = 0.0
    ttft_measured: float = 0.0
    itl_met: float = 0.0
    itl_measured: float = 0.0
    num_judged: float = 0.0
    """By one target or both."""
    num_kept: float = 0.0
    """Of these, that kept all they were judged by."""
    num_running: float = 0.0
    """Requests in flight at this copy now."""
    num_queued: float = 0.0
    """Of these, held back by admission."""
    prefill_steps: PrefillSums = field(default_factory=PrefillSums)
    decode_steps: DecodeSums = field(default_factory=DecodeSums)
    prefill: PoolMoment = field(default_factory=PoolMoment)
    decode: PoolMoment = field(default_factory=PoolMoment)

    def since(self, before: PoolStats) -> PoolStats:
        """What was added to the sums and to the uptime; the rest is as it is now. Never below zero:
        means of several readings may fall by a little."""
        new, old = self.to_numbers(), before.to_numbers()
        added = {name: max(0.0, new[name] - old[name]) for name in _SUMS}
        return PoolStats.from_numbers({**new, **added})

    def plus(self, other: PoolStats) -> PoolStats:
        """Sums of both; the rest is this one's."""
        mine, others = self.to_numbers(), other.to_numbers()
        return PoolStats.from_numbers({**mine, **{n: mine[n] + others[n] for n in _SUMS}})

    def to_numbers(self) -> dict[str, float]:
        """Nested fields as `prefill_num_ready` and the like."""
        return _flat(self)

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> PoolStats:
        """Raises ConfigError naming what is missing or no finite number. Unknown names are passed
        over: the copy may be of a newer release."""
        return _built(cls, numbers, "")


def _flat(value: Any, prefix: str = "") -> dict[str, float]:
    numbers: dict[str, float] = {}
    for part in dataclasses.fields(value):
        held = getattr(value, part.name)
        if dataclasses.is_dataclass(held):
            numbers |= _flat(held, f"{prefix}{part.name}_")
        else:
            numbers[prefix + part.name] = float(held)
    return numbers


def _built(kind: type[T], numbers: Mapping[str, float], prefix: str) -> T:
    values: dict[str, Any] = {}
    for part in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = prefix + part.name
        nested = _NESTED.get(part.name) if not prefix else None
        if nested is not None:
            values[part.name] = _built(nested, numbers, name + "_")
            continue
        number = numbers.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ConfigError(f"pool statistics: {name} must be a number, got {number!r:.60}")
        if not math.isfinite(number):
            raise ConfigError(f"pool statistics: {name} must be finite, got {number}")
        values[part.name] = float(number)
    return kind(**values)


_NESTED: dict[str, type] = {
    "prefill_steps": PrefillSums,
    "decode_steps": DecodeSums,
    "prefill": PoolMoment,
    "decode": PoolMoment,
}

_SUMS = (
    "uptime_s",
    "num_arrived",
    "num_refused",
    "num_prompts",
    "uncached_tokens",
    "pairs",
    "num_ended",
    "output_tokens",
    "held_tokens",
    "ttft_met",
    "ttft_measured",
    "itl_met",
    "itl_measured",
    "num_judged",
    "num_kept",
    *(f"prefill_steps_{part.name}" for part in dataclasses.fields(PrefillSums)),
    *(f"decode_steps_{part.name}" for part in dataclasses.fields(DecodeSums)),
)
