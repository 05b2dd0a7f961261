"""How fast a link is: timed reads of a few scattered units into scratch blocks.

Which units of the peer are read does not matter, since the bytes are thrown away; they are taken
in falling order, so that neighbours do not merge into one long copy that no real read is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np

from baton.core.errors import TransferError
from kvtransfer.plan import BlockIds, PairPlan
from kvtransfer.transport import ReadStats

ScratchRead = Callable[[BlockIds, BlockIds], Awaitable[ReadStats]]
"""Remote units, local units."""


class LinkTiming(NamedTuple):
    """Medians."""

    bytes_per_second: float
    latency_s: float
    """Of reads of one unit, as a caller on the event loop sees them."""


async def time_link(
    read: ScratchRead, plan: PairPlan, *, num_scratch_blocks: int, num_rounds: int
) -> LinkTiming:
    """Times `num_rounds` reads of one unit and as many of all scratch blocks, after an uncounted
    read that sets the link up.

    Raises what `read` raises, and TransferError where there is nothing to read into.
    """
    if num_scratch_blocks < 1 or num_rounds < 1:
        raise TransferError(
            f"{num_scratch_blocks} scratch blocks and {num_rounds} rounds: a link is timed with "
            "at least one of each"
        )
    remote, local = scratch_units(plan, num_scratch_blocks)
    await read(remote[:1], local[:1])
    latencies = []
    for _ in range(num_rounds):
        started_s = time.perf_counter()
        await read(remote[:1], local[:1])
        latencies.append(time.perf_counter() - started_s)
    rates = []
    for _ in range(num_rounds):
        stats = await read(remote, local)
        rates.append(stats.num_bytes / max(stats.seconds, 1e-9))
    return LinkTiming(statistics.median(rates), statistics.median(latencies))


def scratch_units(plan: PairPlan, num_scratch_blocks: int) -> tuple[BlockIds, BlockIds]:
    """Units to read from the peer, and those of our scratch blocks to read them into."""
    per_block = plan.local.units_per_block
    first = (plan.local.num_blocks - num_scratch_blocks) * per_block
    count = min(num_scratch_blocks * per_block, plan.remote.num_units)
    remote = np.arange(count - 1, -1, -1, dtype=np.int32)
    return remote, np.arange(first, first + count, dtype=np.int32)
