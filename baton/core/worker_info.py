"""What a worker says of itself: identity once per start, load once per step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from baton.core.kv_layout import KvLayout

WorkerId = NewType("WorkerId", str)
Epoch = NewType("Epoch", str)
"""Random per process start: a restarted worker is another worker to everyone who held its ids."""

PROTOCOL_VERSION = 3
"""Version of the worker session and of the transfer protocol; peers of another are refused."""


class Role(Enum):
    """The pool a worker serves in. Both run the same engine."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Role:
        return Role.DECODE if self is Role.PREFILL else Role.PREFILL


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Fixed for the life of one worker process, but for `role`, `max_num_seqs` and `role_version`,
    which a change of role replaces together."""

    worker_id: WorkerId
    epoch: Epoch
    role: Role
    address: str
    """host:port of the gRPC server with the session and the transfer service."""
    model_name: str
    layout: KvLayout
    num_blocks: int
    max_model_len: int
    """Tokens of prompt and output together."""
    max_num_seqs: int
    transport: str
    """Name of the preferred KV transport: nixl, shm, socket, none or fake."""
    pid: int
    role_version: int = 1
    """Counts the roles of this process: 1 is the one it was started with. 0: it does not say."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A worker's load at the end of one engine step."""

    num_running: int = 0
    num_waiting: int = 0
    queued_prefill_tokens: int = 0
    """Prompt tokens admitted or waiting that are not computed yet."""
    resident_kv_tokens: int = 0
    """Tokens of running sequences whose KV is in the pool."""
    free_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    leases: int = 0
    """Live leases on this worker's blocks."""
    reservations: int = 0
    """Sequences holding blocks while their KV is still on its way."""
    quarantined_blocks: int = 0
    num_preemptions: int = 0
    """Counter since start."""
    is_draining: bool = False
    is_unhealthy: bool = False
    """The engine makes no progress or is broken: it must get no work."""
    busy_seconds: float = 0.0
    """Counter since start: time spent in engine steps."""
    num_steps: int = 0
    """Counter since start."""

    @property
    def kv_usage(self) -> float:
        """Share of blocks that hold live KV (cached blocks count as free), 0..1."""
        if not self.total_blocks:
            return 0.0
        return 1.0 - (self.free_blocks + self.cached_blocks) / self.total_blocks
