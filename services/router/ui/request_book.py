"""The requests that ended last, and what moved between workers for them.

Keeps records as they are: nothing is rendered for a request that nobody looks at. Does not know:
HTTP, JSON, tenants' rights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.worker_info import WorkerId
from services.router.requests.request_record import RequestRecord

MAX_EDGES = 4096


@dataclass(slots=True)
class Edge:
    """KV that went from one worker to another, since the start of this router."""

    num_bytes: int = 0
    num_transfers: int = 0
    num_moves: int = 0
    """Of the transfers, those of requests that changed their worker while they generated."""


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What charts need of a request, at its end."""

    ttft_s: float | None
    itl_s: float | None


class RequestBook:
    """An `EndedSink`. One per router, on its event loop."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._ended: OrderedDict[str, RequestRecord] = OrderedDict()
        self._edges: OrderedDict[tuple[WorkerId, WorkerId], Edge] = OrderedDict()
        self._since_look: list[EndedRequest] = []

    def ended(self, record: RequestRecord) -> None:
        self._ended[record.request_id] = record
        if len(self._ended) > self._max_requests:
            self._ended.popitem(last=False)
        self._count_edges(record)
        ttft_s = record.timeline.seconds(Event.ARRIVED, Event.FIRST_TOKEN)
        # Bounded where nobody looks.
        if len(self._since_look) < self._max_requests:
            self._since_look.append(EndedRequest(ttft_s, record.mean_itl_s))

    def newest(self) -> Iterator[RequestRecord]:
        """Newest first."""
        return reversed(self._ended.values())

    def find(self, request_id: str) -> RequestRecord | None:
        return self._ended.get(request_id)

    def edges(self) -> Iterator[tuple[WorkerId, WorkerId, Edge]]:
        for (source, target), edge in self._edges.items():
            yield source, target, edge

    def take_ended(self) -> list[EndedRequest]:
        """Since the last call."""
        taken, self._since_look = self._since_look, []
        return taken

    def _count_edges(self, record: RequestRecord) -> None:
        transfer = record.timeline.transfer
        if transfer.num_reads and record.placements:
            placement = record.placements[-1]
            if placement.prefill is not None and placement.decode is not None:
                self._add(placement.prefill, placement.decode, transfer.num_bytes)
        for move in record.migrations:
            if move.has_moved:
                self._add(move.source, move.target, move.transfer.num_bytes, num_moves=1)

    def _add(
        self, source: WorkerId, target: WorkerId, num_bytes: int, *, num_moves: int = 0
    ) -> None:
        edge = self._edges.setdefault((source, target), Edge())
        self._edges.move_to_end((source, target))
        edge.num_bytes += num_bytes
        edge.num_transfers += 1
        edge.num_moves += num_moves
        if len(self._edges) > MAX_EDGES:
            self._edges.popitem(last=False)
