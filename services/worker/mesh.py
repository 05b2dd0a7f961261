"""The links to all peers this worker reads from: kept warm while a router wants them.

A peer that a router lists is connected at once in the background, and again, with growing pauses,
while it cannot be reached; a request that needs a peer never waits for such a pause. A link that
no router lists and no request uses is closed after a while.

Not known here: what goes through a link (`MeshUser` does), how a peer is connected (`peer_link`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable
from typing import Protocol

from baton.core.clock import Clock
from baton.core.errors import BadPeerCard, IncompatiblePeer, TransferError
from baton.core.request import PeerRef
from baton.core.tls import TlsFiles
from baton.core.worker_info import WorkerId, WorkerInfo
from kvtransfer.messages import OwnerMessage, ReaderMessage
from kvtransfer.transport import Transport
from services.worker.fabric import Fabric
from services.worker.peer_link import LinkState, PeerLink
from services.worker.wanted_peers import WantedPeers

TICK_S = 0.25
IDLE_S = 30.0
"""A link that nobody wants stays this long after its last use."""
MAX_CONNECTING = 8
"""Background connections made at the same time; each is timed with reads of its own."""


class MeshUser(Protocol):
    """Who reads through the links. Called on the event loop; must not block."""

    def uses(self, peer: WorkerId) -> bool:
        """True while the link of a peer must not be closed for idleness."""
        ...

    def on_message(self, peer: WorkerId, message: OwnerMessage) -> None: ...

    def on_broken(self, peer: PeerRef) -> None: ...

    def on_restored(self, peer: PeerRef) -> None: ...

    def on_gone(self, peer: PeerRef, error: TransferError) -> None: ...


class Mesh:
    """At most one link per worker id. Implements `LinkListener`."""

    def __init__(
        self,
        *,
        myself: WorkerInfo,
        transport: Transport,
        fabric: Fabric,
        clock: Clock,
        connect_timeout_s: float,
        tls: TlsFiles | None = None,
    ) -> None:
        self._myself = myself
        self._transport = transport
        self._fabric = fabric
        self._clock = clock
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._wanted = WantedPeers()
        self._links: dict[WorkerId, PeerLink] = {}
        self._used_at_s: dict[WorkerId, float] = {}
        self._is_closed = False

    def attach(self, user: MeshUser) -> None:
        """Close the circle: messages of all links go to `user`."""
        self._user = user

    def link_to(self, peer: PeerRef) -> PeerLink:
        """The link to this start of the peer, connecting if need be; another one is replaced.

        Raises TransferError when the worker is stopping.
        """
        if self._is_closed:
            raise TransferError("the worker is stopping")
        self._used_at_s[peer.worker_id] = self._clock.now()
        link = self._links.get(peer.worker_id)
        if link is not None and link.peer == peer and link.is_usable:
            return link
        link = self._links[peer.worker_id] = PeerLink(
            peer,
            myself=self._myself,
            transport=self._transport,
            listener=self,
            connect_timeout_s=self._connect_timeout_s,
            tls=self._tls,
            predecessor=link,
        )
        return link

    def send(self, peer: WorkerId, message: ReaderMessage) -> None:
        """Lost without a link to the peer; see `PeerLink.send` for a broken stream."""
        link = self._links.get(peer)
        if link is not None:
            link.send(message)

    def is_ready(self, peer: PeerRef) -> bool:
        link = self._links.get(peer.worker_id)
        return link is not None and link.peer == peer and link.state is LinkState.READY

    def num_untried(self) -> int:
        """Wanted peers that have no link yet and of which none has failed either."""
        return sum(
            self._wanted.is_untried(worker_id) and not self._has_link(worker_id)
            for worker_id in self._wanted.worker_ids()
        )

    def known_peers(self) -> list[PeerRef]:
        """All that are linked or wanted."""
        known = {link.peer.worker_id: link.peer for link in self._links.values() if link.is_usable}
        for worker_id in self._wanted.worker_ids():
            peer = self._wanted.due(worker_id, float("inf"))
            if peer is not None:
                known.setdefault(worker_id, peer)
        return list(known.values())

    # From routers.

    def want(self, router: Hashable, peers: Iterable[PeerRef]) -> None:
        """A router's list of peers this worker may have to read from; replaces its last one."""
        others = [peer for peer in peers if peer.worker_id != self._myself.worker_id]
        for peer in self._wanted.replace(router, others):
            link = self._links.get(peer.worker_id)
            if link is not None and link.is_usable and link.peer != peer:
                # Listed anew under another start: the known one is a thing of the past.
                self.link_to(peer)
        self._connect_due()

    def forget(self, router: Hashable) -> None:
        """The router has gone."""
        self._wanted.forget(router)

    async def tick_forever(self) -> None:
        """Connect, connect again and close what is idle, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._connect_due()
            self._close_idle()

    async def close(self) -> None:
        """End all links."""
        self._is_closed = True
        await asyncio.gather(*(link.close() for link in list(self._links.values())))

    # From the links.

    def on_message(self, peer: WorkerId, message: OwnerMessage) -> None:
        self._user.on_message(peer, message)

    def on_open(self, peer: PeerRef) -> None:
        self._wanted.connected(peer.worker_id)
        report = self._transport.link(peer.worker_id)
        if report is not None:
            self._fabric.linked(report)

    def on_broken(self, peer: PeerRef) -> None:
        self._user.on_broken(peer)

    def on_restored(self, peer: PeerRef) -> None:
        self._user.on_restored(peer)

    def on_gone(self, peer: PeerRef, error: TransferError) -> None:
        self._user.on_gone(peer, error)
        link = self._links.get(peer.worker_id)
        if link is None or link.peer != peer or self._is_closed:
            # A successor speaks for the peer now.
            return
        self._wanted.failed(peer.worker_id, self._clock.now())
        if self._is_idle(peer.worker_id) and not link.is_usable:
            self._drop(peer.worker_id)
            return
        is_refused = isinstance(error, (IncompatiblePeer, BadPeerCard))
        self._fabric.unlinked(peer, str(error), is_refused=is_refused)

    # Inside.

    def _connect_due(self) -> None:
        if self._is_closed:
            return
        connecting = (LinkState.CONNECTING, LinkState.RECONNECTING)
        num_free = MAX_CONNECTING - sum(link.state in connecting for link in self._links.values())
        for worker_id in self._wanted.worker_ids():
            if num_free <= 0:
                return
            link = self._links.get(worker_id)
            if link is not None and link.is_usable:
                continue
            peer = self._wanted.due(worker_id, self._clock.now())
            if peer is not None:
                self.link_to(peer)
                num_free -= 1

    def _close_idle(self) -> None:
        for worker_id, link in list(self._links.items()):
            if self._is_idle(worker_id):
                if link.is_usable:
                    link.end()
                elif link.state is LinkState.GONE:
                    self._drop(worker_id)

    def _has_link(self, worker_id: WorkerId) -> bool:
        link = self._links.get(worker_id)
        return link is not None and link.state is LinkState.READY

    def _is_idle(self, worker_id: WorkerId) -> bool:
        if worker_id in self._wanted or self._user.uses(worker_id):
            return False
        return self._clock.now() - self._used_at_s[worker_id] >= IDLE_S

    def _drop(self, worker_id: WorkerId) -> None:
        del self._links[worker_id]
        del self._used_at_s[worker_id]
        self._fabric.forget(worker_id)
