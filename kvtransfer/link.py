"""The seam between a mover and the kind of memory access it drives.

A link is owned by one thread: the mover's. `NixlLink`, `ShmLink` and `SocketLink` implement
`PeerLink`; `LinkSet` gives each peer to one of them and is what a mover drives.
"""

from __future__ import annotations

from typing import Protocol

from baton.core.errors import PeerGone, TransferError
from baton.core.worker_info import WorkerId
from kvtransfer.metadata import Endpoint, PeerCard
from kvtransfer.plan import BlockIds, PairPlan


class LinkBroken(TransferError):
    """A link to a living peer failed: what is in flight may still land until a recycle."""


class ConnectionLost(PeerGone):
    """The way to a peer that may live ended, and with it all its reads; the next may open a new
    one."""


class Posted(Protocol):
    """A piece that the link has not finished yet."""

    def is_done(self) -> bool:
        """Raises PeerGone (terminal) or LinkBroken (not terminal)."""
        ...

    def cancel(self) -> bool:
        """Stop the movement if that can be done; True: nothing of it is written any more."""
        ...

    def release(self) -> None:
        """Drop every reference to the link's objects. Does not stop the movement."""
        ...


class Link(Protocol):
    """What a mover drives. All calls come from the mover's thread."""

    def open(self) -> None: ...

    def post(
        self, peer: WorkerId, remote: BlockIds, local: BlockIds, *, by_layer: bool = False
    ) -> Posted | None:
        """Start to move a piece, in units of the peer's plan; None when it is done already.

        `by_layer`: of the plan by layer, asked for only where the link `reads_layers`.

        Raises PeerGone or LinkBroken as `Posted` does.
        """
        ...

    def drop_peer(self, peer: WorkerId) -> None:
        """Forget a peer, if known."""
        ...

    def needs_recycle(self, peer: WorkerId) -> bool:
        """True when pieces of this peer cannot be cancelled, and a recycle would break them."""
        ...

    def recycle(self) -> None:
        """Destroy and rebuild the link: when this returns, nothing posted before can land.

        Raises LinkBroken when it cannot be sure of that.
        """
        ...

    def close(self) -> None: ...


class OpenedPeer(Protocol):
    """A peer that was proved readable and is not in use yet."""

    def close(self) -> None: ...


class PeerLink(Link, Protocol):
    """A link that can describe itself in a card and open those of others."""

    @property
    def name(self) -> str:
        """Of the transport, as endpoints name it."""
        ...

    @property
    def lane(self) -> str:
        """What moves the bytes."""
        ...

    @property
    def reads_layers(self) -> bool:
        """It can be asked for some layers of a unit."""
        ...

    @property
    def endpoint(self) -> Endpoint | None:
        """How others read us, None while they cannot. Current after every `open` and `recycle`;
        read from any thread."""
        ...

    def open_peer(
        self, card: PeerCard, plan: PairPlan, layer_plan: PairPlan | None = None
    ) -> OpenedPeer:
        """Prove that the process that made the card can be read; changes nothing here.

        `layer_plan`: the plan by layer, given where the link `reads_layers`.

        Called on any thread; waits for the peer within a bound of its own. Raises IncompatiblePeer
        or PeerGone.
        """
        ...

    def add_peer(self, peer: WorkerId, opened: OpenedPeer) -> None:
        """Make a peer readable that `open_peer` of this link opened; one of the same name was
        dropped before. Closes `opened` when it fails. Raises as `open_peer` does."""
        ...

    def is_peer_dead(self, peer: WorkerId) -> bool:
        """True when nothing of the peer is written any more because its process has ended."""
        ...
