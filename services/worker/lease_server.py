"""The owner's side of every movement of KV, run over gRPC streams and the engine.

 1. One stream per reader. Its messages and the engine's finished chunks go through `LeaseOwner`,
    whose effects are applied here: send to a stream, call the engine.
 2. What the engine answers (a leased prefix, a refused handover) goes back to the owner.
 3. A clock tick expires what nobody renewed.

A reader has one stream; a new one takes the place of the old, which may not know yet that it is
broken. Not known here: cards, who may read, what a broken stream takes away (`LeaseOwner` does).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Protocol, TypeAlias

import grpc

from baton.core.block import BlockHash, BlockId
from baton.core.errors import BatonError, InvalidRequest, Unavailable
from baton.core.request import RequestId
from baton.engine.engine import ChunkDone, LayersDone
from baton.rpc.v1 import transfer_pb2 as pb
from kvtransfer.messages import Completed, LayersReady, OwnerMessage, Refused
from kvtransfer.owner import (
    COMPLETED,
    FinishHandover,
    FreezeRequest,
    LeaseOwner,
    LeasePrefix,
    OwnerEffect,
    ReaderId,
    ReleaseLease,
    ResumeRequest,
    Send,
    StartHandover,
)
from services.worker.transfer_wire import owner_to_wire, reader_from_wire

logger = logging.getLogger(__name__)

TICK_S = 0.25
MAX_PENDING_MESSAGES = 16384
"""Messages waiting for one reader; beyond it its stream is closed and its leases expire."""

ReaderMessages = AsyncIterator[pb.ReaderMessage]
Context: TypeAlias = grpc.aio.ServicerContext


class LeaseEngine(Protocol):
    """The engine, as the owner of blocks needs it."""

    def release_lease(self, request_id: RequestId) -> None: ...
    async def lease_prefix(
        self, lease_id: RequestId, hashes: Sequence[BlockHash]
    ) -> tuple[BlockId, ...]: ...
    async def start_handover(self, request_id: RequestId, *, num_known_tokens: int) -> None: ...
    def freeze(self, request_id: RequestId) -> None: ...
    def resume(self, request_id: RequestId) -> None: ...
    def finish_handover(self, request_id: RequestId) -> None: ...
    async def ping(self) -> None: ...


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
    """Applies the effects of one `LeaseOwner`. Used by the Transfer service and by the engine."""

    def __init__(self, owner: LeaseOwner, *, engine: LeaseEngine) -> None:
        self._owner = owner
        self._engine = engine
        self._streams: dict[ReaderId, _ReaderStream] = {}
        self._asking: set[asyncio.Task[None]] = set()
        """Questions to the engine whose answers the owner waits for."""

    @property
    def num_leases(self) -> int:
        return self._owner.num_leases

    @property
    def num_expired_leases(self) -> int:
        """Since the start."""
        return self._owner.num_expired_leases

    def announce(self, chunk: ChunkDone) -> None:
        """Blocks of a prompt, or of a request being taken over, are complete and leased."""
        self._apply(
            self._owner.chunk_done(
                chunk.request_id,
                first_block_index=chunk.first_block_index,
                block_ids=chunk.block_ids,
                is_last=chunk.is_last,
                first_token=chunk.first_token,
                fill_id=chunk.fill_id,
            )
        )

    def announce_layers(self, layers: LayersDone) -> None:
        """Some layers of the last blocks of a prompt are complete, while it is computed."""
        request_id = layers.request_id
        ready = LayersReady(
            request_id,
            layers.fill_id,
            layers.first_block_index,
            layers.block_ids,
            layers.num_layers,
        )
        self._apply(self._owner.layers_done(request_id, ready))

    def withdraw(self, request_id: RequestId, reason: str) -> None:
        """The request has ended here, or nobody wants it any more."""
        self._apply(self._owner.request_failed(request_id, reason))

    def handover_over(self, request_id: RequestId) -> None:
        """The engine has ended a handover by itself."""
        reason = "the request was preempted, or has ended on its worker"
        self._apply(self._owner.request_ended(request_id, reason))

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
            # What was sent to it may be lost. The new one hears of a request when it asks again,
            # and then from the beginning; what is announced before that would look like a gap.
            self._apply(self._owner.reader_gone(reader))
        self._streams[reader] = stream
        reading = asyncio.create_task(self._read(reader, messages))
        writing = asyncio.create_task(stream.write_to(context))
        closed = asyncio.create_task(stream.closed.wait())
        tasks = (reading, writing, closed)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if closed.done():
                return Unavailable("the stream was replaced or fell behind")
            return reading.result() if reading.done() and not reading.exception() else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._streams.get(reader) is stream:
                del self._streams[reader]
                self._apply(self._owner.reader_gone(reader))

    async def _read(self, reader: ReaderId, messages: ReaderMessages) -> BatonError | None:
        async for wire in messages:
            try:
                message = reader_from_wire(wire)
            except ValueError as error:
                return InvalidRequest(f"a message of this stream is malformed: {error}")
            if message is not None:
                self._apply(self._owner.receive(reader, message))
        return None

    def _apply(self, effects: Sequence[OwnerEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(reader, message):
                    _log_refusal(reader, message)
                    stream = self._streams.get(reader)
                    if stream is not None:
                        stream.send(message)
                case ReleaseLease(request_id, reason):
                    level = logging.DEBUG if reason == COMPLETED else logging.INFO
                    logger.log(level, "lease of %s released: %s", request_id, reason)
                    self._engine.release_lease(request_id)
                case LeasePrefix():
                    self._ask(self._lease_prefix(effect))
                case StartHandover():
                    self._ask(self._start_handover(effect))
                case FreezeRequest(request_id):
                    self._engine.freeze(request_id)
                case ResumeRequest(request_id, reason):
                    logger.info("request %s stays here: %s", request_id, reason)
                    self._ask(self._resume(request_id))
                case FinishHandover(request_id):
                    self._engine.finish_handover(request_id)

    def _ask(self, question: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(question)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _lease_prefix(self, wanted: LeasePrefix) -> None:
        block_ids: tuple[BlockId, ...] = ()
        try:
            block_ids = await self._engine.lease_prefix(wanted.request_id, wanted.block_hashes)
        except BatonError as error:
            logger.info("no lease for %s: %s", wanted.request_id, error)
        self._apply(self._owner.prefix_leased(wanted.reader, wanted.request_id, block_ids))

    async def _start_handover(self, wanted: StartHandover) -> None:
        try:
            await self._engine.start_handover(
                wanted.request_id, num_known_tokens=wanted.num_known_tokens
            )
        except BatonError as error:
            self._apply(self._owner.handover_failed(wanted.request_id, str(error)))

    async def _resume(self, request_id: RequestId) -> None:
        # Again: the handover may have been asked for after the release was, and leased blocks.
        self._engine.release_lease(request_id)
        self._engine.resume(request_id)
        try:
            # What the engine announced before is here when it has answered.
            await self._engine.ping()
        except BatonError as error:
            logger.info("request %s is not resumed: %s", request_id, error)
        self._apply(self._owner.handover_ended(request_id))


def _log_refusal(reader: ReaderId, message: OwnerMessage) -> None:
    """The reader logs what it is told; here is why for those who look at the owner."""
    match message:
        case Refused(request_id, reason):
            logger.info("request %s of %s refused: %s", request_id, reader, reason)
        case Completed(lease_id, False):
            logger.info("%s asked for a lease that is over, or not its own: %s", reader, lease_id)
