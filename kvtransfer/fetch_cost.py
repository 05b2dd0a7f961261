"""Is it faster to fetch the KV of some tokens, or to compute it? Pure.

    fetch    EXCHANGE_S + latency + num_tokens * token_bytes / bandwidth
    compute  seconds_per_token * n + seconds_per_token_pair * n * (context + n / 2)

Both sides are measured where the question is asked: the link when the peer was connected, the rate
by the worker's own prompts. What is not measured yet counts as the defaults below say. A peer's
cache, the host tier and the disk tier are asked about in the same way.

What is saved grows with n, and ever faster once it does, so the answer is all or nothing.

Not known here: who has the blocks, whether there is room for them.
"""

from __future__ import annotations

from dataclasses import dataclass

EXCHANGE_S = 0.002
"""What a fetch costs beside its bytes: two exchanges of messages, and a turn of the engine's thread
on either side. Half of a short engine step; a read of a long prefix takes many times as long."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a link or a tier delivers."""

    bytes_per_second: float
    latency_s: float = 0.0
    """Until the first block is there."""


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """What computing a prompt takes on this worker."""

    seconds_per_token: float
    seconds_per_token_pair: float = 0.0
    """Of attention: for each token, times the tokens before it. 0 leaves it out, which fetches
    too little of long prompts, never too much."""


DEFAULT_LINK = LinkSpeed(bytes_per_second=1e9, latency_s=0.001)
"""A link that was not timed: 10 Gbit/s Ethernet, the slowest on which workers are spread."""
DEFAULT_PREFILL = PrefillSpeed(seconds_per_token=50e-6)
"""Before the first prompt: 20,000 tokens a second, which is fast, so that an idle worker computes
when in doubt and has its own rate from then on."""
DEFAULT_SECONDS_PER_TOKEN = DEFAULT_PREFILL.seconds_per_token


def fetch_seconds(num_bytes: int, link: LinkSpeed) -> float:
    """From the decision to fetch until the blocks are vouched for."""
    return EXCHANGE_S + link.latency_s + num_bytes / link.bytes_per_second


def compute_seconds(
    num_tokens: int, prefill: PrefillSpeed, *, num_context_tokens: int = 0
) -> float:
    """Of tokens that follow `num_context_tokens` whose KV is there."""
    num_pairs = num_tokens * (num_context_tokens + num_tokens / 2)
    return prefill.seconds_per_token * num_tokens + prefill.seconds_per_token_pair * num_pairs


def num_blocks_worth_fetching(
    *,
    num_blocks: int,
    block_size: int,
    block_bytes: int,
    link: LinkSpeed | None = None,
    prefill: PrefillSpeed | None = None,
    num_context_tokens: int = 0,
) -> int:
    """How many of `num_blocks` blocks, which follow `num_context_tokens`, to fetch: all or none.

    None for a speed, and a link of no bandwidth, mean that it was not measured.
    """
    if link is None or link.bytes_per_second <= 0:
        link = DEFAULT_LINK
    computing_s = compute_seconds(
        num_blocks * block_size, prefill or DEFAULT_PREFILL, num_context_tokens=num_context_tokens
    )
    return num_blocks if fetch_seconds(num_blocks * block_bytes, link) < computing_s else 0


def fetch_pays(
    *,
    num_tokens: int,
    num_bytes: int,
    seconds_per_token: float | None,
    bytes_per_second: float | None,
    latency_s: float | None,
) -> bool:
    """The same question about plain numbers; None for those that were not measured."""
    link = None if bytes_per_second is None else LinkSpeed(bytes_per_second, latency_s or 0.0)
    prefill = None if seconds_per_token is None else PrefillSpeed(seconds_per_token)
    fetched = num_blocks_worth_fetching(
        num_blocks=1, block_size=num_tokens, block_bytes=num_bytes, link=link, prefill=prefill
    )
    return fetched > 0
