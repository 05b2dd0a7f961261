"""From where each candidate would get the leading blocks of a prompt that it need not compute.

For every worker there are several ways, and the cheapest one counts:

    device         its own blocks in the KV pool; nothing to move
    host, disk     those and more from its own tiers, at the rates of a restore
    fetch, k-th    those and more from another worker, at the rate of the link between the two
    (none)         every way leaves the rest of the prompt to be computed; longer is not always
                   cheaper, which is why each is priced

Blocks of a peer are counted from what it said it holds on its device: that is what it can lease.
The worker that computes decides again with what it has measured itself; here the order of the
candidates depends on it.

Pure. Does not know: load, decoding, sessions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.core.tier import Tier
from services.router.placement.candidates import Floats, Pool
from services.router.placement.placement import PrefixOffer
from services.router.placement.policy_config import PolicyConfig

MAX_SOURCES = 4
"""Peers whose blocks are weighed, longest prefixes first, the least leased of equal ones."""
LEASE_BLOCKS = 1e-4
"""What a lease counts against blocks when sources are compared: enough to tell equal ones apart."""
_DEVICE, _HOST, _DISK = map(int, Tier)


class Ways(NamedTuple):
    """[way, candidate]; first those of a worker's own, then one for each of `sources`."""

    tokens: Floats
    """Leading tokens of the prompt that need not be computed."""
    move_s: Floats
    first_fetch: int
    """1 where no worker has blocks outside its pool, else one for each tier."""
    sources: list[int]
    """Positions in the pool."""
    source_blocks: Floats
    own_blocks: Floats
    """Of each candidate, on any tier."""


def ways_to_prefix(
    pool: Pool,
    expected: NDArray[np.int32],
    held: NDArray[np.int32],
    leases: Floats,
    num_tokens: int,
    config: PolicyConfig,
) -> Ways | None:
    """All ways of all candidates; None when no block of the prompt is cached anywhere.

    `expected`, `held`: [tier, member] blocks of the prompt on each worker; the first also counts
    what a worker has only been sent. The last of the prompt's `num_tokens` tokens is computed in
    any case.
    """
    block_size = pool.layout.block_size
    if num_tokens % block_size == 0:
        # The last block contains the last token, and is worth nothing.
        usable = num_tokens // block_size - 1
        expected, held = np.minimum(expected, usable), np.minimum(held, usable)
    own = expected[:, : pool.num_candidates]
    on_device = held[_DEVICE].astype(np.float64)
    sources = _sources(on_device, leases, config.min_offer_blocks)
    if not sources and not own[_DISK].any():
        return None
    # Bytes are compared several times faster than numbers.
    has_tiers = expected[_DEVICE].tobytes() != expected[_DISK].tobytes()
    first_fetch = _DISK + 1 if has_tiers else _DEVICE + 1
    shape = (first_fetch + len(sources), pool.num_candidates)
    tokens, move_s = np.empty(shape), np.zeros(shape)
    tokens[:first_fetch] = own[:first_fetch]
    longest = tokens[first_fetch - 1].copy()
    if has_tiers:
        _price_restores(tokens, move_s, pool.layout.block_bytes, config)
    source_blocks = on_device.take(sources)
    if sources:
        more = source_blocks[:, None] - longest
        np.maximum(more, 0.0, out=more)
        np.add(more, longest, out=tokens[first_fetch:])
        # Who gains nothing pays the latency here, and so stays on a way of its own.
        more *= pool.fetch_block_s.take(sources, axis=0)
        more += pool.fetch_latency.take(sources, axis=0)
        np.add(more, move_s[first_fetch - 1], out=move_s[first_fetch:])
    tokens *= block_size
    return Ways(tokens, move_s, first_fetch, sources, source_blocks, longest)


def offer_for(
    ways: Ways, pool: Pool, position: int, way: int, min_blocks: int
) -> PrefixOffer | None:
    """The peer to name to the worker at `position`: that of its way, or else the one that holds
    most, which the worker may find to pay by its own measurements."""
    if not ways.sources:
        return None
    is_fetch = way >= ways.first_fetch
    k = way - ways.first_fetch if is_fetch else 0
    own, source = int(ways.own_blocks.item(position)), ways.sources[k]
    num_blocks = int(ways.source_blocks.item(k))
    if source == position or num_blocks - own < (1 if is_fetch else min_blocks):
        return None
    return PrefixOffer(pool.worker_id(source), num_blocks, own)


def _sources(on_device: Floats, leases: Floats, min_blocks: int) -> list[int]:
    """Positions of members worth reading from: the longest first, among equals the least leased."""
    key = leases * LEASE_BLOCKS
    np.subtract(on_device, key, out=key)
    last = len(key) - MAX_SOURCES
    best = (key.argpartition(last)[last:] if last > 0 else key.argsort()).tolist()
    best.sort(key=key.item, reverse=True)
    return [position for position in best if on_device.item(position) >= min_blocks]


def _price_restores(tokens: Floats, move_s: Floats, block_bytes: int, config: PolicyConfig) -> None:
    """The ways from a worker's own tiers, still in blocks."""
    rates = (config.host_tier_bytes_per_second, config.disk_tier_bytes_per_second)
    for tier, rate in zip((_HOST, _DISK), rates, strict=True):
        more = tokens[tier] - tokens[tier - 1]
        move_s[tier] = move_s[tier - 1] + more * (block_bytes / rate)
        move_s[tier] += config.fetch_s * (more > 0)
