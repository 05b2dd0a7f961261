"""The owner's side of the hand-off on the wire: the Transfer service over `LeaseOwner`.

 1. Connect: a reader shows its card and gets ours; a peer that must not read is told why.
 2. Leases: one stream per reader. Its messages and the engine's finished chunks go through the
    state machine, whose effects are applied here: send to a stream, release in the engine.
 3. A clock tick expires what nobody renewed.

A broken stream releases nothing: leases run until they expire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

import grpc

from baton.core.errors import BatonError, IncompatiblePeer, InvalidRequest, Unavailable
from baton.core.kv_layout import KvLayout
from baton.core.logging import log_fields
from baton.core.request import RequestId
from baton.core.worker_info import PROTOCOL_VERSION
from baton.engine.engine import ChunkDone
from baton.rpc.channel import abort
from baton.rpc.v1 import transfer_pb2 as pb
from baton.rpc.v1 import transfer_pb2_grpc as pb_grpc
from kvtransfer.messages import OwnerMessage
from kvtransfer.metadata import check_compatible, open_card
from kvtransfer.owner import LeaseOwner, OwnerEffect, ReaderId, ReleaseLease, Send
from kvtransfer.transport import Transport
from services.worker.engine_loop import EngineLoop
from services.worker.transfer_wire import owner_to_wire, reader_from_wire

logger = logging.getLogger(__name__)

TICK_S = 0.25
HELLO_TIMEOUT_S = 10.0
MAX_PENDING_MESSAGES = 16384
"""Messages waiting for one reader; beyond it its stream is closed and its leases expire."""
MAX_KNOWN_READERS = 4096

ReaderMessages = AsyncIterator[pb.ReaderMessage]
Context: TypeAlias = grpc.aio.ServicerContext


class _ReaderStream:
    """Messages on their way to one reader."""

    def __init__(self) -> None:
        self._pending: asyncio.Queue[OwnerMessage] = asyncio.Queue(MAX_PENDING_MESSAGES)
        self.closed = asyncio.Event()

    def send(self, message: OwnerMessage) -> None:
        try:
            self._pending.put_nowait(message)
        except asyncio.QueueFull:
            self.closed.set()

    async def write_to(self, context: Context) -> None:
        while True:
            await context.write(owner_to_wire(await self._pending.get()))


class LeaseServer:
    """Applies the effects of one `LeaseOwner`. Used by the service below and by the engine."""

    def __init__(self, owner: LeaseOwner, *, engine: EngineLoop) -> None:
        self._owner = owner
        self._engine = engine
        self._streams: dict[ReaderId, _ReaderStream] = {}

    @property
    def num_leases(self) -> int:
        return self._owner.num_leases

    def announce(self, chunk: ChunkDone) -> None:
        """Blocks of a PREFILL request are complete and leased in the engine."""
        self._apply(
            self._owner.chunk_done(
                chunk.request_id,
                first_block_index=chunk.first_block_index,
                block_ids=chunk.block_ids,
                is_last=chunk.is_last,
                first_token=chunk.first_token,
            )
        )

    def withdraw(self, request_id: RequestId, reason: str) -> None:
        """The request has ended here, or nobody wants it any more."""
        self._apply(self._owner.request_failed(request_id, reason))

    def close(self) -> None:
        """End all streams; the leases are left to the drain before and the exit after."""
        for stream in self._streams.values():
            stream.closed.set()

    async def tick_forever(self) -> None:
        """Let time pass for the leases until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._apply(self._owner.tick())

    async def serve(
        self, reader: ReaderId, messages: ReaderMessages, context: Context
    ) -> BatonError | None:
        """One reader's stream; returns why it must end with an error, None when it hung up."""
        stream = _ReaderStream()
        older = self._streams.get(reader)
        if older is not None:
            older.closed.set()
        self._streams[reader] = stream
        tasks = [
            asyncio.create_task(self._read(reader, messages)),
            asyncio.create_task(stream.write_to(context)),
            asyncio.create_task(stream.closed.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return (
                Unavailable("the stream was replaced or fell behind") if tasks[2].done() else None
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._streams.get(reader) is stream:
                del self._streams[reader]
                self._apply(self._owner.reader_gone(reader))

    async def _read(self, reader: ReaderId, messages: ReaderMessages) -> None:
        async for wire in messages:
            message = reader_from_wire(wire)
            if message is not None:
                self._apply(self._owner.receive(reader, message))

    def _apply(self, effects: Sequence[OwnerEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(reader, message):
                    stream = self._streams.get(reader)
                    if stream is not None:
                        stream.send(message)
                case ReleaseLease(request_id, reason):
                    logger.debug("lease of request %s released: %s", request_id, reason)
                    self._engine.release_lease(request_id)


class TransferServicer(pb_grpc.TransferServicer):
    """Implements baton.v1.Transfer."""

    def __init__(
        self, leases: LeaseServer, transport: Transport, *, layout: KvLayout, secret: bytes
    ) -> None:
        self._leases = leases
        self._transport = transport
        self._layout = layout
        self._secret = secret
        # Ordered, so that the oldest can be forgotten; a reader connects anew for each stream.
        self._known_readers: dict[ReaderId, None] = {}

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectReply:
        try:
            if request.protocol_version != PROTOCOL_VERSION:
                raise IncompatiblePeer(
                    f"reader speaks protocol version {request.protocol_version}, this worker "
                    f"{PROTOCOL_VERSION}; run the same release on both"
                )
            card = open_card(request.card, self._secret, now_s=time.time())
            check_compatible(card, layout=self._layout, transport=self._transport.name)
        except BatonError as error:
            logger.warning("a reader was refused: %s", error)
            await abort(context, error)
        self._remember(_reader_id(card.worker_id, card.epoch))
        log_fields(
            logger, f"reader {card.worker_id} connected", reader=card.worker_id, epoch=card.epoch
        )
        return pb.ConnectReply(card=self._transport.card())

    async def Leases(self, messages: ReaderMessages, context: Context) -> None:
        try:
            reader = await self._hello(messages)
        except BatonError as error:
            await abort(context, error)
        reason = await self._leases.serve(reader, messages, context)
        if reason is not None:
            await abort(context, reason)

    def _remember(self, reader: ReaderId) -> None:
        self._known_readers.pop(reader, None)
        self._known_readers[reader] = None
        if len(self._known_readers) > MAX_KNOWN_READERS:
            del self._known_readers[next(iter(self._known_readers))]

    async def _hello(self, messages: ReaderMessages) -> ReaderId:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(messages, None)
        except TimeoutError:
            raise Unavailable(f"no hello within {HELLO_TIMEOUT_S:.0f} s") from None
        if first is None or first.WhichOneof("body") != "hello":
            raise InvalidRequest("the first message of a lease stream must be hello")
        reader = _reader_id(first.hello.worker_id, first.hello.epoch)
        if reader not in self._known_readers:
            raise IncompatiblePeer(f"reader {reader} has not connected with a card")
        return reader


def _reader_id(worker_id: str, epoch: str) -> ReaderId:
    return ReaderId(f"{worker_id}@{epoch}")
