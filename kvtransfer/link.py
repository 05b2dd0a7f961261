"""The seam between a mover and the kind of memory access it drives.

A link is owned by one thread: the mover's. `NixlLink` and `ShmLink` implement `PeerLink`.
"""

from __future__ import annotations

from typing import Protocol

from baton.core.errors import TransferError
from baton.core.worker_info import WorkerId
from kvtransfer.metadata import Endpoint, PeerCard
from kvtransfer.plan import BlockIds


class LinkBroken(TransferError):
    """A link to a living peer failed: what is in flight may still land until a recycle."""


class Posted(Protocol):
    """A piece that the link has not finished yet."""

    def is_done(self) -> bool:
        """Raises PeerGone (terminal) or LinkBroken (not terminal)."""
        ...

    def release(self) -> None:
        """Drop every reference to the link's objects. Does not stop the movement."""
        ...


class Link(Protocol):
    """What a mover drives. All calls come from the mover's thread."""

    def open(self) -> None: ...

    def post(self, peer: WorkerId, remote: BlockIds, local: BlockIds) -> Posted | None:
        """Start to move a piece; None when it is done already.

        Raises PeerGone or LinkBroken as `Posted` does.
        """
        ...

    def drop_peer(self, peer: WorkerId) -> None:
        """Forget a peer, if known."""
        ...

    def recycle(self) -> None:
        """Destroy and rebuild the link: when this returns, nothing posted before can land.

        Raises LinkBroken when it cannot be sure of that.
        """
        ...

    def close(self) -> None: ...


class PeerLink(Link, Protocol):
    """A link that can describe itself in a card and open those of others."""

    @property
    def name(self) -> str: ...

    @property
    def endpoint(self) -> Endpoint:
        """Current after every `open` and `recycle`; read from any thread."""
        ...

    @property
    def canary(self) -> tuple[int, bytes]:
        """Address (or offset) and content."""
        ...

    def check_peer(self, card: PeerCard) -> None:
        """Prove with the canary that the card's process can be read; changes nothing.

        Raises IncompatiblePeer or PeerGone.
        """
        ...

    def add_peer(self, card: PeerCard) -> None:
        """Make a checked peer readable; a peer of the same name was dropped before.

        Raises as `check_peer` does.
        """
        ...

    def is_peer_dead(self, peer: WorkerId) -> bool:
        """True when the peer's process has ended."""
        ...
