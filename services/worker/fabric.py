"""What this worker says of its links, tiers and counters, and when its routers are told.

Told at once when a link comes, goes or changes, and once per load period while anything counts
up. Parts of the worker count where things happen; what others count is collected at the report.

Not known here: gRPC, how links are made.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from baton.core.fabric import FabricCounters, FabricReport, LinkReport, TierReport
from baton.core.logging import log_fields
from baton.core.request import PeerRef
from baton.core.worker_info import WorkerId
from services.worker.session import Sessions

logger = logging.getLogger(__name__)

MAX_LINKS = 4096
"""Links of a report; the oldest failed one makes room."""

Tiers = Callable[[], tuple[TierReport, ...]]
Count = Callable[[FabricCounters], None]


class Fabric:
    """One worker's view of its ways for KV."""

    def __init__(self, sessions: Sessions) -> None:
        self.counters = FabricCounters()
        self._sessions = sessions
        self._links: dict[WorkerId, LinkReport] = {}
        self._tiers: Tiers = tuple
        self._counts: list[Count] = []
        self._told = FabricReport()

    def attach_tiers(self, tiers: Tiers) -> None:
        self._tiers = tiers

    def add_counts(self, count: Count) -> None:
        """`count` writes what it knows into the counters of each report."""
        self._counts.append(count)

    def link(self, peer: WorkerId) -> LinkReport | None:
        return self._links.get(peer)

    def linked(self, report: LinkReport) -> None:
        """A peer is connected, or measured again. The transport has logged it."""
        self._set(report)

    def unlinked(self, peer: PeerRef, reason: str, *, is_refused: bool) -> None:
        """There is no link to a peer: refused by one of the two, unreachable or lost."""
        known = self._links.get(peer.worker_id)
        report = LinkReport(peer.worker_id, peer.epoch, "", reason=reason)
        if known == report:
            return
        self.counters.refused_peers += is_refused
        log_fields(
            logger, f"no link to {peer.worker_id}: {reason}", peer=peer.worker_id, reason=reason
        )
        self._set(report)

    def forget(self, peer: WorkerId) -> None:
        """Nobody wants the peer any more."""
        if self._links.pop(peer, None) is not None:
            self.tell()

    def report(self) -> FabricReport:
        counters = dataclasses.replace(self.counters)
        for count in self._counts:
            count(counters)
        return FabricReport(tuple(self._links.values()), self._tiers(), counters)

    def tell(self) -> None:
        """To all routers now."""
        self._told = self.report()
        self._sessions.broadcast_fabric(self._told)

    def tell_if_changed(self) -> None:
        """Once per load period."""
        if self.report() != self._told:
            self.tell()

    def _set(self, report: LinkReport) -> None:
        # Inserted anew: the first ones are those that have not changed for longest.
        self._links.pop(report.peer_id, None)
        self._links[report.peer_id] = report
        if len(self._links) > MAX_LINKS:
            links = self._links.values()
            oldest = next((link for link in links if not link.transport), next(iter(links)))
            del self._links[oldest.peer_id]
        self.tell()
