"""Several links as one: each peer is served by one of them, a mover drives them all.

The links come in order of preference. Which of them serves a peer is decided by whoever adds it
(see `mover_transport`). A link that cannot be opened here is left out, with its reason kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from baton.core.errors import PeerGone, TransferError
from baton.core.worker_info import WorkerId
from kvtransfer.link import OpenedPeer, PeerLink, Posted
from kvtransfer.metadata import Endpoint
from kvtransfer.plan import BlockIds

logger = logging.getLogger(__name__)


class LinkSet:
    """Implements `Link`. Everything but the properties runs on the mover's thread."""

    def __init__(self, links: Sequence[PeerLink]) -> None:
        self._wanted = tuple(links)
        self._opened: tuple[PeerLink, ...] = ()
        self._of_peer: dict[WorkerId, PeerLink] = {}
        self.obstacles: dict[str, str] = {}
        """Why a link is not among those opened."""

    @property
    def links(self) -> tuple[PeerLink, ...]:
        """Those that work here, in order of preference."""
        return self._opened

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        found = (link.endpoint for link in self._opened)
        return tuple(endpoint for endpoint in found if endpoint is not None)

    def open(self) -> None:
        """Raises TransferError when no link can be opened."""
        opened: list[PeerLink] = []
        for link in self._wanted:
            try:
                link.open()
            except TransferError as error:
                self.obstacles[link.name] = str(error)
            else:
                opened.append(link)
        self._opened = tuple(opened)
        if not opened:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.obstacles.items())
            raise TransferError(f"no KV transport works here: {reasons}")

    def add_peer(self, peer: WorkerId, link: PeerLink, opened: OpenedPeer) -> None:
        """Let `link` serve a peer that it has opened; raises as `PeerLink.add_peer`."""
        assert peer not in self._of_peer, "the former link of a peer is dropped first"
        link.add_peer(peer, opened)
        self._of_peer[peer] = link

    def is_peer_dead(self, peer: WorkerId) -> bool:
        link = self._of_peer.get(peer)
        return link is None or link.is_peer_dead(peer)

    def drop_peer(self, peer: WorkerId) -> None:
        link = self._of_peer.pop(peer, None)
        if link is not None:
            link.drop_peer(peer)

    def post(
        self, peer: WorkerId, remote: BlockIds, local: BlockIds, *, by_layer: bool = False
    ) -> Posted | None:
        link = self._of_peer.get(peer)
        if link is None:
            raise PeerGone(f"{peer} is not connected")
        return link.post(peer, remote, local, by_layer=by_layer)

    def needs_recycle(self, peer: WorkerId) -> bool:
        link = self._of_peer.get(peer)
        return link is not None and link.needs_recycle(peer)

    def recycle(self) -> None:
        for link in self._opened:
            link.recycle()

    def close(self) -> None:
        """Closes every link, whatever becomes of the others."""
        self._of_peer.clear()
        for link in self._opened:
            try:
                link.close()
            except Exception as error:
                # The text only: a kept exception keeps frames, and with them the link's objects.
                logger.error("KV link %s did not close cleanly: %s", link.name, str(error))
