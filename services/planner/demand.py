"""How many workers a load needs: the arithmetic of both pools. Pure.

Prefill: the pool is a queue. With c workers, each busy a share rho of its time, a request waits
longer than t with about the probability C(c, rho) * exp(-2 c (1 - rho) t / s) for service time s:
Erlang's formula for waiting at all, and half its mean wait, as services of like lengths have
(Kingman's approximation with a squared coefficient of variation near 0; Kleinrock 1976, Queueing
Systems vol. 2, §2.1). Decode: the largest batch whose step keeps the ITL, and that fits into the KV
memory; Little's law says how many sequences there are.

Does not know: what was observed, what is decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from services.planner.pool_model import PoolModel

MAX_WORKERS = 100_000
MEMORY_SHARE = 0.9
"""Of KV memory that decoding sequences may fill; the rest is what they grow into."""


@dataclass(frozen=True, slots=True)
class Load:
    """Of all requests of a moment. Means of what is computed, so a cached prefix is no prompt."""

    rate_per_s: float
    uncached_tokens: float
    """Of a prompt."""
    pairs: float
    """Token and token before it, of a prompt: its quadratic term, as a mean of products."""
    output_tokens: float
    context_tokens: float
    """That a decoding sequence holds on average."""


def prefill_s(model: PoolModel, load: Load) -> float:
    """Of one mean prompt, in a step of its own."""
    hardware = model.hardware
    return (
        hardware.step_fixed_s
        + hardware.step_gap_s
        + hardware.prefill_token_s * load.uncached_tokens
        + hardware.prefill_pair_s * load.pairs
    )


def ttft_miss_share(model: PoolModel, load: Load, num_workers: int, ttft_s: float) -> float:
    """Share of requests that wait for longer than the target leaves beside their own prefill."""
    seconds = prefill_s(model, load)
    if seconds >= ttft_s:
        return 1.0
    offered = load.rate_per_s * seconds
    if offered >= num_workers:
        return 1.0
    busy = offered / num_workers
    decay = 2 * num_workers * (1 - busy) / seconds
    return erlang_c(num_workers, offered) * math.exp(-decay * (ttft_s - seconds))


def prefill_workers(model: PoolModel, load: Load, *, ttft_s: float, share: float) -> int:
    """The fewest that keep `ttft_s` for `share` of all; where a prompt alone takes longer than the
    target, those that keep the queue from growing."""
    if load.rate_per_s <= 0:
        return 0
    seconds = prefill_s(model, load)
    least = math.floor(load.rate_per_s * seconds) + 1
    if seconds >= ttft_s:
        return least
    num = least
    while num < MAX_WORKERS and ttft_miss_share(model, load, num, ttft_s) > 1 - share:
        num += 1
    return num


class DecodeBatch(NamedTuple):
    """The largest batch of a decode worker, and the step it makes."""

    by_pace: float
    """Sequences whose step takes as long as the ITL allows."""
    by_memory: float
    """That fit into KV memory."""
    batch: float
    """The smaller of both, at least 1."""
    step_s: float


def decode_batch(
    model: PoolModel, load: Load, *, itl_s: float, memory_share: float = MEMORY_SHARE
) -> DecodeBatch:
    """Of sequences of mean length, in `memory_share` of a worker's KV memory."""
    hardware = model.hardware
    of_sequence_s = hardware.decode_sequence_s + hardware.decode_kv_token_s * load.context_tokens
    fixed_s = hardware.step_fixed_s + hardware.step_gap_s
    by_pace = (itl_s - fixed_s) / of_sequence_s if of_sequence_s > 0 else math.inf
    by_memory = memory_share * model.max_kv_tokens / max(1.0, load.context_tokens)
    batch = max(1.0, min(by_pace, by_memory))
    return DecodeBatch(by_pace, by_memory, batch, fixed_s + of_sequence_s * batch)


def decode_workers(
    model: PoolModel, load: Load, *, itl_s: float, memory_share: float = MEMORY_SHARE
) -> int:
    """The fewest whose batches keep `itl_s` and fit into `memory_share` of their KV memory."""
    if load.rate_per_s <= 0 or load.output_tokens <= 1:
        return 0 if load.rate_per_s <= 0 else 1
    most = decode_batch(model, load, itl_s=itl_s, memory_share=memory_share)
    # Little's law: each sequence stays for its tokens' steps.
    num_sequences = load.rate_per_s * (load.output_tokens - 1) * most.step_s
    return max(1, math.ceil(num_sequences / most.batch - 1e-9))


def erlang_c(num_servers: int, offered: float) -> float:
    """Probability that all servers are busy, for `offered` below `num_servers`."""
    blocked = 1.0
    for k in range(1, num_servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return num_servers * blocked / (num_servers - offered * (1 - blocked))
