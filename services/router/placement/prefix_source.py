"""From where each candidate would get the leading blocks of a prompt that it need not compute.

For every worker there are several ways, and the cheapest one counts:

    device         its own blocks in the KV pool; nothing to move
    host, disk     those and more from its own tiers, at the rates of a restore
    fetch, k-th    those and more from another worker, at the rate of the link between the two
    (none)         every way leaves the rest of the prompt to be computed; longer is not always
                   cheaper, which is why each is priced

Blocks of a peer are counted from what it said it holds on its device: that is what it can lease.
A peer that has more than nobody is no way. The worker that computes decides again with what it has
measured itself; here the order of the candidates depends on it.

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


class Way(NamedTuple):
    """Arrays over candidates."""

    blocks: Floats
    """Leading ones of the prompt that need not be computed."""
    move_s: Floats | None
    """None: nothing to move."""


class Ways(NamedTuple):
    """First those of a worker's own, of which the first moves nothing, then one for each of
    `sources`."""

    ways: list[Way]
    first_fetch: int
    """1 where no worker has blocks outside its pool, else one for each tier."""
    sources: list[int]
    """Positions in the pool."""
    source_blocks: list[float]
    own_blocks: Floats
    """Of each candidate, on any tier."""


def ways_to_prefix(
    pool: Pool,
    expected: NDArray[np.int32],
    held: NDArray[np.int32],
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
    on_device = held[_DEVICE].astype(np.float64)
    device, disk = expected[_DEVICE, : pool.num_candidates], expected[_DISK, : pool.num_candidates]
    # Bytes are compared several times faster than numbers.
    has_tiers = device.tobytes() != disk.tobytes()
    own = longest = device.astype(np.float64)
    ways = [Way(own, None)]
    if has_tiers:
        longest = disk.astype(np.float64)
        host = expected[_HOST, : pool.num_candidates].astype(np.float64)
        ways += _restores(own, host, longest, pool.layout.block_bytes, config)
    # What all have anyway is nothing to be read.
    least = max(longest.item(longest.argmin()), config.min_offer_blocks - 1)
    sources = _sources(on_device, pool, least)
    if not sources and not longest.item(longest.argmax()):
        return None
    first_fetch, restore_s = len(ways), ways[-1].move_s
    blocks = [on_device.item(source) for source in sources]
    for source, num_blocks in zip(sources, blocks, strict=True):
        reached = np.maximum(longest, num_blocks)
        move_s = reached - longest
        move_s *= pool.fetch_block_s[source]
        # Who gains nothing pays the latency here, and so stays on a way of its own.
        move_s += pool.fetch_latency[source]
        if restore_s is not None:
            move_s += restore_s
        ways.append(Way(reached, move_s))
    return Ways(ways, first_fetch, sources, blocks, longest)


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
    num_blocks = int(ways.source_blocks[k])
    if source == position or num_blocks - own < (1 if is_fetch else min_blocks):
        return None
    return PrefixOffer(pool.worker_id(source), num_blocks, own)


def _sources(on_device: Floats, pool: Pool, least: float) -> list[int]:
    """Positions of members with more than `least` blocks: the longest first, among equals the
    least leased."""
    sources: list[int] = (on_device > least).nonzero()[0].tolist()
    if len(sources) > 1:
        key = pool.leases()
        key *= -LEASE_BLOCKS
        key += on_device
        if len(sources) > MAX_SOURCES:
            sources = key.argpartition(-MAX_SOURCES)[-MAX_SOURCES:].tolist()
        sources.sort(key=key.item, reverse=True)
    return sources


def _restores(
    device: Floats, host: Floats, disk: Floats, block_bytes: int, config: PolicyConfig
) -> list[Way]:
    """The ways from a worker's own tiers."""
    more = host - device
    host_s = more * (block_bytes / config.host_tier_bytes_per_second)
    host_s += config.fetch_s * (more > 0)
    more = disk - host
    disk_s = more * (block_bytes / config.disk_tier_bytes_per_second)
    disk_s += config.fetch_s * (more > 0)
    disk_s += host_s
    return [Way(host, host_s), Way(disk, disk_s)]
