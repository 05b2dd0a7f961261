"""The reader's stream to one prefill worker, opened on demand and shared by all requests.

    CONNECTING ── cards exchanged, stream open ──► READY ── stream breaks ──► RECONNECTING
        │                                            ▲                          │      │
        │                                            └─────── same epoch ───────┘      │
        └── unreachable, refused ──────────────► GONE ◄── unreachable, another epoch ──┘

A link that is GONE never comes back; the next request opens a new one. Every wait is bounded by
`connect_timeout_s`. Not known here: requests, reads, leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from enum import Enum
from typing import Protocol

import grpc

from baton.core.errors import IncompatiblePeer, PeerGone, TransferError
from baton.core.logging import log_fields
from baton.core.request import PeerRef
from baton.core.worker_info import PROTOCOL_VERSION, WorkerId, WorkerInfo
from baton.rpc.channel import open_channel
from baton.rpc.v1 import transfer_pb2 as pb
from baton.rpc.v1 import transfer_pb2_grpc as pb_grpc
from kvtransfer.messages import OwnerMessage, ReaderMessage
from kvtransfer.transport import Transport
from services.worker.transfer_wire import owner_from_wire, reader_to_wire

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0
_REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
}


class LinkState(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    RECONNECTING = "reconnecting"
    GONE = "gone"


class LinkListener(Protocol):
    """Called on the event loop; must not block."""

    def on_message(self, peer: WorkerId, message: OwnerMessage) -> None: ...

    def on_broken(self, peer: PeerRef) -> None:
        """The stream broke; messages sent from now on are lost."""
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
    ) -> None:
        """`predecessor`: a dead or older link to the same worker id; it is ended first, because
        the transport knows one epoch of a peer at a time."""
        self.peer = peer
        self.state = LinkState.CONNECTING
        self._myself = myself
        self._transport = transport
        self._listener = listener
        self._connect_timeout_s = connect_timeout_s
        self._is_replaced = False
        self._outgoing: asyncio.Queue[ReaderMessage] = asyncio.Queue()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(predecessor), name=f"link to {peer.worker_id}")

    async def ready(self) -> None:
        """Waits until the first connection is made. Raises TransferError when it is not."""
        await asyncio.shield(self._opened)
        if self.state is LinkState.GONE:
            raise PeerGone(f"the link to {self.peer.worker_id} ended as soon as it was open")

    def send(self, message: ReaderMessage) -> None:
        """Hand a message to the stream; lost while the stream is broken."""
        if self.state is LinkState.READY:
            self._outgoing.put_nowait(message)

    async def close(self) -> None:
        """End the link; the listener hears `on_gone`."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT_S)

    async def _replace(self) -> None:
        """Close in favour of a successor, to whom the transport's peer belongs from now on.

        Its connect replaces our epoch. A disconnect of ours could come after that, since the
        wait for our end is bounded, and would take away the new epoch.
        """
        self._is_replaced = True
        await self.close()

    async def _run(self, predecessor: PeerLink | None) -> None:
        error: TransferError = PeerGone(f"the link to {self.peer.worker_id} was closed")
        try:
            if predecessor is not None:
                await predecessor._replace()
            while True:
                await self._serve_once()
                self.state = LinkState.RECONNECTING
                self._listener.on_broken(self.peer)
        except TransferError as failure:
            error = failure
        finally:
            self.state = LinkState.GONE
            if not self._opened.done():
                self._opened.set_exception(error)
                # Whoever waits gets it; nobody may be waiting.
                self._opened.exception()
            log_fields(
                logger,
                f"link to {self.peer.worker_id} gone: {error}",
                peer=self.peer.worker_id,
                reason=str(error),
            )
            self._listener.on_gone(self.peer, error)
            if not self._is_replaced:
                with contextlib.suppress(TransferError):
                    await self._transport.disconnect(self.peer.worker_id)

    async def _serve_once(self) -> None:
        """Connect and serve until the stream breaks. Raises TransferError when unreachable."""
        channel = open_channel(self.peer.address)
        try:
            stub = pb_grpc.TransferStub(channel)
            call = await self._open(stub)
            self._on_open()
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
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(channel.close(), CLOSE_TIMEOUT_S)

    async def _open(self, stub: pb_grpc.TransferStub) -> grpc.aio.StreamStreamCall:
        peer = self.peer
        where = f"prefill worker {peer.worker_id} at {peer.address}"
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                reply = await stub.Connect(
                    pb.ConnectRequest(
                        protocol_version=PROTOCOL_VERSION, card=self._transport.card()
                    )
                )
                worker_id, epoch = await self._transport.connect(reply.card)
                call = stub.Leases()
                hello = pb.ReaderHello(worker_id=self._myself.worker_id, epoch=self._myself.epoch)
                await call.write(pb.ReaderMessage(hello=hello))
        except TimeoutError:
            limit = f"{self._connect_timeout_s:g} s"
            raise PeerGone(f"{where} did not answer within {limit}") from None
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                raise IncompatiblePeer(f"{where} refused: {error.details()}") from None
            raise PeerGone(f"{where} is unreachable: {error.code().name}") from None
        except asyncio.InvalidStateError:
            raise PeerGone(f"{where} ended the stream at once") from None
        if (worker_id, epoch) != (peer.worker_id, peer.epoch):
            call.cancel()
            raise PeerGone(f"{where} has restarted or is another worker: {worker_id} {epoch}")
        return call

    def _on_open(self) -> None:
        is_first = not self._opened.done()
        while not self._outgoing.empty():
            self._outgoing.get_nowait()
        self.state = LinkState.READY
        if is_first:
            self._opened.set_result(None)
        else:
            self._listener.on_restored(self.peer)

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        """A write that fails ends the stream, which the reading side notices."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(reader_to_wire(await self._outgoing.get()))
