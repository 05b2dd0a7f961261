"""The router's picture of the cluster at one moment, as plain values for `policy`.

Knows nothing of sessions: `worker_pool` takes the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.fabric import FabricReport
from baton.core.worker_info import LoadReport, Role, WorkerId, WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker with what it reported last and what this router has sent it since."""

    info: WorkerInfo
    load: LoadReport
    load_age_s: float = 0.0
    """Seconds since the worker's last message."""
    num_in_flight: int = 0
    """Requests of this router on the worker."""
    unreported_prefill_tokens: int = 0
    """Prompt tokens sent so recently that `load` cannot contain them."""
    unreported_kv_tokens: int = 0
    """Tokens of KV that recently sent requests will hold, likewise."""
    is_quarantined: bool = False
    """The session is broken or the worker made no progress: no work until it has recovered."""
    is_leaving: bool = False
    """No longer a member: it finishes its requests, or loses them to others."""
    fabric: FabricReport | None = None
    """How KV comes to the worker, as it last said."""

    @property
    def is_eligible(self) -> bool:
        return not (self.is_quarantined or self.is_ending or self.load.is_unhealthy)

    @property
    def is_ending(self) -> bool:
        """Goes on with its requests and takes no others."""
        return self.is_leaving or self.load.is_draining

    @property
    def is_readable(self) -> bool:
        """Its engine answers, so its blocks can be leased."""
        return not (self.is_quarantined or self.load.is_unhealthy)

    @property
    def resident_kv_tokens(self) -> int:
        """Tokens of KV held now or soon: running sequences, reservations, what is on its way.

        Counted from the pool where its size is known, since that includes reservations.
        """
        load = self.load
        held_blocks = load.total_blocks - load.free_blocks - load.cached_blocks
        held = max(load.resident_kv_tokens, held_blocks * self.info.layout.block_size)
        return held + self.unreported_kv_tokens

    @property
    def available_blocks(self) -> int:
        """Blocks a new sequence can get: free ones and those the prefix cache would give up."""
        pending = self.info.layout.num_blocks_for(self.unreported_kv_tokens)
        return max(0, self.load.free_blocks + self.load.cached_blocks - pending)

    @property
    def queued_prefill_tokens(self) -> int:
        return self.load.queued_prefill_tokens + self.unreported_prefill_tokens

    @property
    def num_sequences(self) -> int:
        load = self.load
        return max(load.num_running + load.num_waiting + load.reservations, self.num_in_flight)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All known workers. A snapshot: nothing in it changes."""

    workers: tuple[WorkerState, ...] = ()

    def eligible(self, *, model: str) -> list[WorkerState]:
        """Workers that may take new work for `model`."""
        return [w for w in self.workers if w.is_eligible and w.info.model_name == model]

    def num_live(self, role: Role) -> int:
        return sum(1 for w in self.workers if w.info.role is role and not w.is_quarantined)

    def get(self, worker_id: WorkerId) -> WorkerState | None:
        return next((w for w in self.workers if w.info.worker_id == worker_id), None)
