"""The reader's stream to one peer, shared by all requests that read from it.

    CONNECTING ── cards exchanged, stream open ──► READY ── stream breaks ──► RECONNECTING
        │                                            ▲                          │      │
        │                                            └─────── same epoch ───────┘      │
        └── unreachable, refused ──────────────► GONE ◄── unreachable, another epoch ──┘

Cards are exchanged in two steps: the owner gives a nonce for ours and gets one for its own, so
that a recorded card is of no use.

A link that is GONE never comes back; `mesh` opens a new one. Every wait is bounded by
`connect_timeout_s`. Not known here: requests, reads, leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from enum import Enum
from typing import Protocol

import grpc

from baton.core.errors import IncompatiblePeer, PeerGone, TransferError
from baton.core.request import PeerRef
from baton.core.tls import TlsFiles
from baton.core.worker_info import PROTOCOL_VERSION, Epoch, WorkerId, WorkerInfo
from baton.rpc.channel import open_channel, unreachable_reason
from baton.rpc.v1 import transfer_pb2 as pb
from baton.rpc.v1 import transfer_pb2_grpc as pb_grpc
from kvtransfer.messages import GiveUp, OwnerMessage, ReaderMessage
from kvtransfer.transport import Transport
from services.worker.transfer_wire import owner_from_wire, reader_to_wire

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0
NONCE_BYTES = 16
STEADY_S = 1.0
"""A stream that broke after this time is made anew at once."""
FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0
"""Below the time that fetches give a broken stream (`transfer.link_grace_s`)."""
_REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
}


class LinkState(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    RECONNECTING = "reconnecting"
    GONE = "gone"


class LinkListener(Protocol):
    """Called on the event loop; must not block."""

    def on_message(self, peer: WorkerId, message: OwnerMessage) -> None: ...

    def on_open(self, peer: PeerRef) -> None:
        """Cards are exchanged and the stream is open, for the first time or again."""
        ...

    def on_broken(self, peer: PeerRef) -> None:
        """The stream broke; what is sent before it is restored is lost, but for `GiveUp`."""
        ...

    def on_restored(self, peer: PeerRef) -> None:
        """A new stream to the same process is open."""
        ...

    def on_gone(self, peer: PeerRef, error: TransferError) -> None:
        """The link has ended for good."""
        ...


class PeerLink:
    """One peer, one epoch."""

    def __init__(
        self,
        peer: PeerRef,
        *,
        myself: WorkerInfo,
        transport: Transport,
        listener: LinkListener,
        connect_timeout_s: float,
        predecessor: PeerLink | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """`predecessor`: a dead or older link to the same worker id; it is ended first, because
        the transport knows one epoch of a peer at a time."""
        self.peer = peer
        self.state = LinkState.CONNECTING
        self._myself = myself
        self._transport = transport
        self._listener = listener
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._is_replaced = False
        self._is_closing = False
        self._has_begun = False
        self._outgoing: asyncio.Queue[ReaderMessage] = asyncio.Queue()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(predecessor), name=f"link to {peer.worker_id}")

    @property
    def is_usable(self) -> bool:
        """False when only a new link can reach the peer."""
        return self.state is not LinkState.GONE and not self._is_closing

    async def ready(self) -> None:
        """Waits until the first connection is made. Raises TransferError when it is not."""
        await asyncio.shield(self._opened)
        if self.state is LinkState.GONE:
            raise PeerGone(f"the link to {self.peer.worker_id} ended as soon as it was open")

    def send(self, message: ReaderMessage) -> None:
        """Hand a message to the stream; while that is broken, lost but for what is given up.

        Fetches ask again on the next stream. Of those that have ended nobody else would tell the
        owner, which would keep their blocks until the leases expire.
        """
        is_kept = self.state is LinkState.RECONNECTING and isinstance(message, GiveUp)
        if self.state is LinkState.READY or is_kept:
            self._outgoing.put_nowait(message)

    async def close(self) -> None:
        """End the link and wait for that, for a bounded time; the listener hears `on_gone`."""
        self.end()
        await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT_S)

    def end(self) -> None:
        """Begin to close."""
        self._is_closing = True
        self._task.cancel()
        if not self._has_begun:
            # A task that is cancelled before its first step runs no line of its own.
            self._has_begun = True
            self._gone(PeerGone(f"the link to {self.peer.worker_id} was closed"))

    async def _replace(self) -> None:
        """Close in favour of a successor, to whom the transport's peer belongs from now on.

        Its connect replaces our epoch. A disconnect of ours could come after that, since the
        wait for our end is bounded, and would take away the new epoch.
        """
        self._is_replaced = True
        await self.close()

    async def _run(self, predecessor: PeerLink | None) -> None:
        self._has_begun = True
        error: TransferError = PeerGone(f"the link to {self.peer.worker_id} was closed")
        try:
            if predecessor is not None:
                await predecessor._replace()
            pause_s = 0.0
            while True:
                lived_s = await self._serve_once()
                self.state = LinkState.RECONNECTING
                self._listener.on_broken(self.peer)
                pause_s = next_pause_s(pause_s, lived_s)
                await asyncio.sleep(pause_s)
        except TransferError as failure:
            error = failure
        finally:
            self._gone(error)
            if not self._is_replaced:
                with contextlib.suppress(TransferError):
                    await self._transport.disconnect(self.peer.worker_id)

    def _gone(self, error: TransferError) -> None:
        self.state = LinkState.GONE
        if not self._opened.done():
            self._opened.set_exception(error)
            # Whoever waits gets it; nobody may be waiting.
            self._opened.exception()
        self._listener.on_gone(self.peer, error)

    async def _serve_once(self) -> float:
        """Connect and serve until the stream breaks; returns how long it lived in seconds.

        Raises TransferError when the peer cannot be reached.
        """
        channel = open_channel(self.peer.address, self._tls)
        try:
            stub = pb_grpc.TransferStub(channel)
            call = await self._open(stub)
            self._on_open()
            opened_at_s = asyncio.get_running_loop().time()
            writing = asyncio.create_task(self._write(call))
            try:
                async for wire in call:
                    message = owner_from_wire(wire)
                    if message is not None:
                        self._listener.on_message(self.peer.worker_id, message)
            except grpc.aio.AioRpcError as error:
                logger.info("stream to %s broke: %s", self.peer.worker_id, error.details())
            finally:
                writing.cancel()
                call.cancel()
            return asyncio.get_running_loop().time() - opened_at_s
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(channel.close(), CLOSE_TIMEOUT_S)

    async def _open(self, stub: pb_grpc.TransferStub) -> grpc.aio.StreamStreamCall:
        peer, myself = self.peer, self._myself
        where = f"worker {peer.worker_id} at {peer.address}"
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                worker_id, epoch = await self._exchange_cards(stub)
                call = stub.Leases()
                hello = pb.ReaderHello(worker_id=myself.worker_id, epoch=myself.epoch)
                await call.write(pb.ReaderMessage(hello=hello))
        except TimeoutError:
            limit = f"{self._connect_timeout_s:g} s"
            raise PeerGone(f"{where} did not answer within {limit}") from None
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                raise IncompatiblePeer(f"{where} refused: {error.details()}") from None
            reason = await unreachable_reason(error, peer.address, self._tls)
            raise PeerGone(f"{where} is unreachable: {reason}") from None
        except asyncio.InvalidStateError:
            raise PeerGone(f"{where} ended the stream at once") from None
        if (worker_id, epoch) != (peer.worker_id, peer.epoch):
            call.cancel()
            raise PeerGone(f"{where} has restarted or is another worker: {worker_id} {epoch}")
        return call

    async def _exchange_cards(self, stub: pb_grpc.TransferStub) -> tuple[WorkerId, Epoch]:
        """Who answered. Raises TransferError when the transport refuses its card."""
        myself = self._myself
        challenge = await stub.Challenge(
            pb.ChallengeRequest(worker_id=myself.worker_id, epoch=myself.epoch)
        )
        nonce = secrets.token_bytes(NONCE_BYTES)
        reply = await stub.Connect(
            pb.ConnectRequest(
                protocol_version=PROTOCOL_VERSION,
                card=self._transport.card(challenge.nonce),
                nonce=nonce,
                challenge=challenge.nonce,
            )
        )
        return await self._transport.connect(reply.card, nonce=nonce)

    def _on_open(self) -> None:
        is_first = not self._opened.done()
        for _ in range(self._outgoing.qsize()):
            message = self._outgoing.get_nowait()
            if isinstance(message, GiveUp):
                self._outgoing.put_nowait(message)
        self.state = LinkState.READY
        self._listener.on_open(self.peer)
        if is_first:
            self._opened.set_result(None)
        else:
            self._listener.on_restored(self.peer)

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        """A write that fails ends the stream, which the reading side notices."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                message = await self._outgoing.get()
                try:
                    await call.write(reader_to_wire(message))
                except BaseException:
                    # For the next stream, should it be of those that are kept.
                    self._outgoing.put_nowait(message)
                    raise


def next_pause_s(last_pause_s: float, lived_s: float) -> float:
    """How long to wait before a stream that lived `lived_s` is made anew."""
    if lived_s >= STEADY_S:
        return 0.0
    return min(MAX_PAUSE_S, max(FIRST_PAUSE_S, 2 * last_pause_s))
