"""The cluster as the page draws it: workers of both pools and what passes between them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.worker_info import WorkerId
from services.router.ui.request_book import Edge
from services.router.workers.cluster_view import ClusterView, WorkerState


@dataclass(frozen=True, slots=True)
class WorkerNode:
    id: str
    role: str
    state: str
    """ready, draining, unhealthy or lost."""
    model: str
    kv_usage: float
    """Share of its KV memory held by live requests, 0 to 1."""
    kv_cached: float
    """Share that the prefix cache holds beside them."""
    num_running: int
    num_waiting: int
    num_in_flight: int
    """Of this router copy."""
    queued_prefill_tokens: int
    num_leases: int
    """Readers of its blocks at this moment."""
    num_reservations: int
    """Requests whose KV is on its way here."""
    num_preemptions: int
    busy_s: float
    """Counter: in engine steps."""


@dataclass(frozen=True, slots=True)
class TransferEdge:
    """Counters since the start of this router copy."""

    source: str
    target: str
    num_bytes: int
    num_transfers: int
    num_moves: int


@dataclass(frozen=True, slots=True)
class Topology:
    workers: list[WorkerNode]
    edges: list[TransferEdge]


def topology(view: ClusterView, edges: Iterable[tuple[WorkerId, WorkerId, Edge]]) -> Topology:
    """Edges to workers that are gone are left out."""
    workers = sorted((_node(w) for w in view.workers), key=lambda w: (w.role, w.id))
    present = {worker.id for worker in workers}
    return Topology(
        workers,
        [
            TransferEdge(source, target, edge.num_bytes, edge.num_transfers, edge.num_moves)
            for source, target, edge in edges
            if source in present and target in present
        ],
    )


def _node(worker: WorkerState) -> WorkerNode:
    load = worker.load
    return WorkerNode(
        id=worker.info.worker_id,
        role=worker.info.role.value,
        state=_state(worker),
        model=worker.info.model_name,
        kv_usage=round(load.kv_usage, 4),
        kv_cached=round(load.cached_blocks / load.total_blocks, 4) if load.total_blocks else 0.0,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_in_flight=worker.num_in_flight,
        queued_prefill_tokens=worker.queued_prefill_tokens,
        num_leases=load.leases,
        num_reservations=load.reservations,
        num_preemptions=load.num_preemptions,
        busy_s=round(load.busy_seconds, 3),
    )


def _state(worker: WorkerState) -> str:
    if worker.is_quarantined:
        return "lost"
    if worker.load.is_unhealthy:
        return "unhealthy"
    return "draining" if worker.is_ending else "ready"
