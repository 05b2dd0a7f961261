"""What a mover keeps: reads, their pieces in flight, and the bounds on both. No behaviour of links.

A read is in units of its pair of pools (see `plan`); what is held in quarantine are the blocks of
our pool that these units lie in.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from baton.core.errors import ConfigError
from baton.core.worker_info import WorkerId
from kvtransfer.link import Posted
from kvtransfer.plan import BlockIds, PairPlan
from kvtransfer.transport import ReadStats


@dataclass(frozen=True, slots=True)
class MoverLimits:
    """Bounds of one mover."""

    max_bytes_in_flight: int = 64 << 20
    """Of healthy reads; more is queued."""
    max_piece_bytes: int = 8 << 20
    """A piece is moved in one call on host memory: it bounds how late a cancel is noticed."""
    max_quarantined_ratio: float = 0.05
    """Share of the pool in quarantine above which the link is recycled."""
    max_quarantine_s: float = 60.0
    """Age of a quarantined piece at which the link is recycled."""
    recycle_pause_s: float = 5.0
    """Between two recycles, so that a hopeless link does not keep the thread busy."""
    min_poll_s: float = 0.0001
    """Between two looks at a piece in flight. Shorter ones take the time of a link's own thread
    where it has one."""

    def __post_init__(self) -> None:
        if not 0 < self.max_piece_bytes <= self.max_bytes_in_flight:
            raise ConfigError(
                f"max_piece_bytes {self.max_piece_bytes} must be between 1 and "
                f"max_bytes_in_flight {self.max_bytes_in_flight}"
            )
        if not 0 <= self.max_quarantined_ratio <= 1 or self.max_quarantine_s < 0:
            raise ConfigError("max_quarantined_ratio must be 0..1, max_quarantine_s not negative")


@dataclass(slots=True)
class MoverCounters:
    """Since the start; written by the mover's thread, read by any."""

    reads: int = 0
    read_bytes: int = 0
    failed_reads: int = 0
    recycles: int = 0


@dataclass(slots=True, eq=False)
class BlockRead:
    """One read; changed on the mover's thread only."""

    peer: WorkerId
    plan: PairPlan
    remote: BlockIds
    local: BlockIds
    deadline_s: float
    """On the mover's clock."""
    is_scratch: bool = False
    """Into blocks that belong to nobody, so that nobody wants to hear when they are settled."""
    future: Future[ReadStats] = field(default_factory=Future)
    num_posted: int = 0
    num_in_flight: int = 0
    num_descriptors: int = 0
    started_at_s: float = 0.0
    is_over: bool = False

    @property
    def num_bytes(self) -> int:
        return len(self.local) * self.plan.local.unit_bytes

    def blocks_of(self, units: BlockIds) -> set[int]:
        """The blocks of our pool that these local units lie in."""
        return set(np.unique(units // self.plan.local.units_per_block).tolist())


@dataclass(slots=True, eq=False)
class Piece:
    """A part of a read that its link is moving."""

    read: BlockRead
    local: BlockIds
    posted: Posted
    posted_at_s: float
    given_up_at_s: float | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.local) * self.read.plan.local.unit_bytes

    @property
    def is_healthy(self) -> bool:
        return self.given_up_at_s is None
