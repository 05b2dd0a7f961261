"""A transport whose blocks are moved by a `Mover`: cards and the event loop on top of a link.

This is where a peer is accepted or refused. Order of the checks on a card: signature, expiry,
version, layout, transport (`metadata`); same host, same pid namespace, not ourselves, not older
than the epoch we know; and then the link opens it and proves with the canary that it reaches the
process that made the card.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from baton.core.block import BlockId
from baton.core.errors import (
    BadPeerCard,
    IncompatiblePeer,
    PeerGone,
    TransferError,
    TransferTimeout,
)
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.link import PeerLink
from kvtransfer.metadata import (
    CARD_LIFETIME_S,
    PeerCard,
    PeerIdentity,
    check_compatible,
    open_card,
    seal_card,
)
from kvtransfer.mover import BlockRead, Mover, MoverLimits
from kvtransfer.peer_process import host_id, pid_namespace
from kvtransfer.plan import checked_pair
from kvtransfer.transport import PoolRegion, ReadStats

T = TypeVar("T")
OPEN_TIMEOUT_S = 60.0
"""Opening a link loads libraries and takes half a second on a quiet machine."""
PEER_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 20.0


class MoverTransport:
    """Implements `Transport` over any `PeerLink`."""

    def __init__(
        self,
        *,
        link: PeerLink,
        region: PoolRegion,
        identity: PeerIdentity,
        secret: bytes,
        limits: MoverLimits | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the link; takes half a second with NIXL. Raises TransferError when it cannot."""
        self._link = link
        self._region = region
        self._identity = identity
        self._secret = secret
        self._wall_clock = wall_clock
        self._peers: dict[WorkerId, PeerCard] = {}
        self._is_closed = False
        self._mover = Mover(
            link,
            block_bytes=region.layout.block_bytes,
            num_blocks=region.num_blocks,
            limits=limits or MoverLimits(),
            name=f"kv-mover-{link.name}",
        )
        self._mover.start(timeout_s=OPEN_TIMEOUT_S)

    @property
    def name(self) -> str:
        return self._link.name

    @property
    def num_recycles(self) -> int:
        """How often the link had to be rebuilt."""
        return self._mover.num_recycles

    def card(self) -> bytes:
        now_s = self._wall_clock()
        canary_address, canary = self._link.canary
        card = PeerCard(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            transport=self._link.name,
            layout=self._region.layout,
            num_blocks=self._region.num_blocks,
            host_id=host_id(),
            pid_namespace=pid_namespace(),
            pid=os.getpid(),
            canary_address=canary_address,
            canary=canary,
            endpoint=self._link.endpoint,
            issued_at_s=now_s,
            expires_at_s=now_s + CARD_LIFETIME_S,
        )
        return seal_card(card, self._secret)

    def verify(self, card: bytes) -> PeerCard:
        """All checks of a card that need no contact to the peer. Raises as `connect` does."""
        peer = open_card(card, self._secret, now_s=self._wall_clock())
        check_compatible(peer, layout=self._region.layout, transport=self._link.name)
        if peer.host_id != host_id():
            raise IncompatiblePeer(
                f"{peer.worker_id} runs on another host; transport {self._link.name} reads host "
                "memory within one host only, so place both workers on the same one"
            )
        if peer.pid_namespace != pid_namespace():
            raise IncompatiblePeer(
                f"{peer.worker_id} runs in another pid namespace; start both workers in one "
                "container or let the containers share their process namespace"
            )
        return peer

    async def connect(self, card: bytes) -> tuple[WorkerId, Epoch]:
        self._check_open()
        peer = self.verify(card)
        if peer.worker_id == self._identity.worker_id:
            raise IncompatiblePeer(f"{peer.worker_id} is this worker's own name; choose another")
        await self._call(lambda: self._add(peer))
        return peer.worker_id, peer.epoch

    async def read(
        self,
        peer: WorkerId,
        remote: Sequence[BlockId],
        local: Sequence[BlockId],
        *,
        timeout_s: float,
    ) -> ReadStats:
        self._check_open()
        card = self._peers.get(peer)
        if card is None:
            raise PeerGone(f"{peer} is not connected")
        remote_ids, local_ids = checked_pair(
            remote,
            local,
            peer=peer,
            num_remote_blocks=card.num_blocks,
            num_local_blocks=self._region.num_blocks,
        )
        read = BlockRead(
            peer=peer,
            remote=remote_ids,
            local=local_ids,
            deadline_s=time.monotonic() + timeout_s,
        )
        if not len(read.local):
            return ReadStats(0, 0, 0.0)
        self._mover.read(read)
        try:
            return await asyncio.wrap_future(read.future)
        except asyncio.CancelledError:
            self._mover.give_up(read)
            raise

    def settled(self) -> list[BlockId]:
        return self._mover.settled()

    async def recycle(self) -> None:
        """Rebuild the link: the one hard cancel. All given-up blocks are settled afterwards."""
        self._check_open()
        await asyncio.wrap_future(self._mover.recycle())

    async def disconnect(self, peer: WorkerId) -> None:
        self._check_open()
        await self._call(lambda: self._remove(peer, "disconnected"))

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.to_thread(self._mover.stop, timeout_s=CLOSE_TIMEOUT_S)

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferError("the transport is closed")

    async def _call(self, function: Callable[[], T]) -> T:
        future: Future[T] = self._mover.call(function)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), PEER_TIMEOUT_S)
        except TimeoutError:
            raise TransferTimeout(f"the KV mover is busy for {PEER_TIMEOUT_S:g} s") from None

    def _add(self, card: PeerCard) -> None:
        """On the mover's thread."""
        known = self._peers.get(card.worker_id)
        if known is not None:
            if known.epoch != card.epoch and known.issued_at_s > card.issued_at_s:
                raise BadPeerCard(f"card of {card.worker_id} is older than the epoch in use")
            is_same = (known.epoch, known.endpoint) == (card.epoch, card.endpoint)
            if is_same and not self._link.is_peer_dead(card.worker_id):
                return
        # Before the known peer is dropped: a useless card must not cost us a good peer.
        self._link.check_peer(card)
        self._remove(card.worker_id, "replaced by a new epoch")
        self._link.add_peer(card)
        self._peers[card.worker_id] = card

    def _remove(self, peer: WorkerId, reason: str) -> None:
        """On the mover's thread."""
        if self._peers.pop(peer, None) is None:
            return
        if self._link.is_peer_dead(peer):
            self._mover.fail_peer(peer, PeerGone(f"{peer}: its process has ended"))
        else:
            self._mover.leave_peer(peer, reason)
