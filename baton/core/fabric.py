"""What a worker says of the ways on which KV comes to it: links, tiers, counters.

Measured by the reader, told to the routers on the session, shown as metrics. Rates are bytes per
second; nothing here is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.core.worker_info import Epoch, WorkerId


@dataclass(frozen=True, slots=True)
class LinkReport:
    """One peer that this worker reads from, or cannot read from."""

    peer_id: WorkerId
    peer_epoch: Epoch
    transport: str
    """nixl, mapped, shm, socket or fake; empty while there is no link."""
    lane: str = ""
    """What the link really does: cma, cuda_ipc, mapped memory, tcp."""
    bytes_per_second: float = 0.0
    """Of the timed reads at connect, or of the last measurement."""
    latency_s: float = 0.0
    """Median of reads of one block."""
    reason: str = ""
    """Why faster transports were not taken, or why there is no link."""


class TierName(Enum):
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class TierReport:
    """Blocks outside the pool that this worker can restore."""

    tier: TierName
    num_blocks: int = 0
    num_bytes: int = 0
    max_bytes: int = 0
    reason: str = ""
    """Why the tier takes no more blocks, empty while it does."""


@dataclass(slots=True)
class FabricCounters:
    """Counted since the start of the process."""

    reads: int = 0
    read_bytes: int = 0
    failed_reads: int = 0
    expired_leases: int = 0
    recycles: int = 0
    refused_peers: int = 0
    fetched_blocks: int = 0
    """Blocks read from peers' prefix caches."""
    saved_blocks: int = 0
    """Blocks written to tiers."""
    restored_blocks: int = 0
    """Blocks read back from tiers."""
    corrupt_blocks: int = 0
    """Tier entries whose checksum was wrong; dropped."""
    takeovers: int = 0
    failed_takeovers: int = 0
    takeover_pause_seconds: float = 0.0
    """Sum, from asking the old worker to stop until all its KV was here and vouched for."""


@dataclass(frozen=True, slots=True)
class FabricReport:
    """Everything at one time."""

    links: tuple[LinkReport, ...] = ()
    tiers: tuple[TierReport, ...] = ()
    counters: FabricCounters = field(default_factory=FabricCounters)
