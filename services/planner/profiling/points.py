"""Which steps of an engine are worth measuring: lengths, batches and contexts within its limits.

Does not know: engines, clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.errors import ConfigError

ROOM_SHARE = 0.75
"""Of the KV memory that a measurement may fill: nothing is to be preempted."""
NEW_TOKENS = (16, 64, 256)
CONTEXTS = (32, 256, 1024, 4096, 16384)
JOINING_TOKENS = 64
GROWTH_TOKENS = 256
"""That each sequence of a batch may generate while it is measured."""
MIN_ROOM_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """One prompt on an idle engine."""

    num_cached_tokens: int
    num_new_tokens: int

    @property
    def name(self) -> str:
        return f"prefill {self.num_new_tokens} after {self.num_cached_tokens}"

    @property
    def num_tokens(self) -> int:
        return self.num_cached_tokens + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class BatchPoint:
    """Sequences of one context, in batches from `batch_sizes[0]` down."""

    num_context_tokens: int
    batch_sizes: tuple[int, ...]
    num_joining_tokens: int
    """Of the prompt that is computed beside each batch that leaves it a place."""

    @property
    def name(self) -> str:
        return f"batches of up to {self.batch_sizes[0]} x {self.num_context_tokens}"

    @property
    def num_tokens(self) -> int:
        return self.batch_sizes[0] * self.num_context_tokens


Point = PrefillPoint | BatchPoint


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Of one engine, as its worker runs it."""

    max_model_len: int
    max_kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int


def choose_points(limits: EngineLimits, *, max_tokens: int) -> list[Point]:
    """None of them computes more than `max_tokens` prompt tokens.

    Raises ConfigError when the engine has too little room for any.
    """
    room = int(min(limits.max_kv_tokens * ROOM_SHARE, max_tokens))
    if limits.max_kv_tokens < MIN_ROOM_TOKENS:
        raise ConfigError(
            f"the KV memory holds {limits.max_kv_tokens} tokens, a profile needs at least "
            f"{MIN_ROOM_TOKENS}; raise engine.kv_cache_bytes or engine.gpu_memory_fraction"
        )
    longest = min(room, limits.max_model_len - 1)
    step = limits.max_num_batched_tokens
    points: list[Point] = [
        PrefillPoint(cached, new)
        for cached in sorted({0, 256, step, 4 * step})
        for new in sorted({*NEW_TOKENS, step, 2 * step})
        if cached + new <= longest
    ]
    for context in CONTEXTS:
        if context + GROWTH_TOKENS > limits.max_model_len:
            continue
        largest = min(limits.max_num_seqs, room // context)
        largest = min(largest, int(limits.max_kv_tokens * ROOM_SHARE) // (context + GROWTH_TOKENS))
        if largest >= 1:
            points.append(BatchPoint(context, tuple(_halves(largest)), JOINING_TOKENS))
    return points


def _halves(largest: int) -> Iterable[int]:
    size = largest
    while size > 1:
        yield size
        # Powers of two below the largest.
        size = 1 << ((size - 1).bit_length() - 1)
    yield 1
