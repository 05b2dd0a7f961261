"""A rank's transport, commanded by rank 0. Runs in the rank's own process, on its own loop.

 1. Opened: what peers need to read this rank's pool.
 2. Calls, side by side, each answered once; a cancelled one too.
 3. Settled, CardChanged and Recycled whenever there is something to say.
 4. The end of the stream, or CloseRank, closes the transport.

Not known here: why rank 0 reads, what the other ranks do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from dataclasses import dataclass, replace
from typing import Protocol

from baton.core.errors import TransferError, TransferTimeout
from baton.core.fabric import LinkReport
from kvtransfer.metadata import PeerCard
from kvtransfer.rank_messages import (
    Call,
    Cancel,
    CardChanged,
    CloseRank,
    Connected,
    ConnectRank,
    DisconnectRank,
    Ended,
    Failure,
    MeasureRank,
    Opened,
    ReadBlocks,
    Recycled,
    Request,
    Settled,
    read_message,
    write_message,
)
from kvtransfer.transport import ReadStats, Transport

logger = logging.getLogger(__name__)

POLL_S = 0.25
"""How long rank 0 may hand out a card that a rebuilt link has outdated; its peers ask again."""
FAST_POLL_S = 0.01
NUM_FAST_POLLS = 100
"""After a call has failed: what was given up is settled within a moment, or only in seconds."""


class CardTransport(Transport, Protocol):
    """A transport whose cards can be signed elsewhere."""

    @property
    def num_recycles(self) -> int:
        """How often a link had to be rebuilt."""
        ...

    def unsigned_card(self, nonce: bytes) -> PeerCard: ...


async def serve_rank(connection: socket.socket, transport: CardTransport) -> None:
    """Returns when rank 0 has hung up or closed the transport. Closes both."""
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    server = _RankServer(transport, writer)
    try:
        await server.serve(reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@dataclass(slots=True, eq=False)
class _RunningCall:
    task: asyncio.Task[Connected | LinkReport | ReadStats | None]
    is_started: bool = False


class _RankServer:
    def __init__(self, transport: CardTransport, writer: asyncio.StreamWriter) -> None:
        self._transport = transport
        self._writer = writer
        self._calls: dict[int, _RunningCall] = {}
        self._card = _timeless(transport.unsigned_card(b""))
        self._num_recycles = 0
        self._wake = asyncio.Event()
        self._num_fast_polls = 0

    async def serve(self, reader: asyncio.StreamReader) -> None:
        write_message(self._writer, Opened(self._transport.name, self._card))
        reporter = asyncio.create_task(self._report())
        try:
            while (message := await read_message(reader)) is not None:
                match message:
                    case Call(call_id, CloseRank()):
                        await self._close(reporter)
                        write_message(self._writer, Ended(call_id))
                        return
                    case Call(call_id, request):
                        self._start(call_id, request)
                    case Cancel(call_id) if call_id in self._calls:
                        self._calls[call_id].task.cancel()
                    case _:
                        pass
        finally:
            await self._close(reporter)

    async def _close(self, reporter: asyncio.Task[None]) -> None:
        tasks = [reporter, *(call.task for call in self._calls.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()

    def _start(self, call_id: int, request: Request) -> None:
        async def run() -> Connected | LinkReport | ReadStats | None:
            self._calls[call_id].is_started = True
            return await self._result(request)

        self._calls[call_id] = _RunningCall(asyncio.create_task(run()))
        self._calls[call_id].task.add_done_callback(lambda task: self._ended(call_id))

    def _ended(self, call_id: int) -> None:
        """Answers, once, however the call ended."""
        call = self._calls.pop(call_id)
        ended = Ended(call_id)
        if call.task.cancelled():
            # What never started has nothing in flight, so nothing of it will be settled.
            given_up = TransferTimeout if call.is_started else TransferError
            ended = replace(ended, failure=Failure.of(given_up("the call was given up")))
        elif (error := call.task.exception()) is not None:
            if not isinstance(error, TransferError):
                logger.error("a call of rank 0 failed", exc_info=error)
            ended = replace(ended, failure=Failure.of(error))
        else:
            ended = replace(ended, result=call.task.result())
        if ended.failure is not None:
            self._num_fast_polls = NUM_FAST_POLLS
            self._wake.set()
        write_message(self._writer, ended)

    async def _result(self, request: Request) -> Connected | LinkReport | ReadStats | None:
        transport = self._transport
        match request:
            case ConnectRank(card, nonce):
                peer, epoch = await transport.connect(card, nonce=nonce)
                return Connected(
                    peer,
                    epoch,
                    transport.link(peer),
                    transport.units_per_block(peer),
                    transport.num_layers(peer),
                )
            case MeasureRank(peer, num_rounds, timeout_s):
                return await transport.measure(peer, num_rounds=num_rounds, timeout_s=timeout_s)
            case ReadBlocks(peer, remote, local, timeout_s, layers):
                return await transport.read(
                    peer, remote.tolist(), local.tolist(), timeout_s=timeout_s, layers=layers
                )
            case DisconnectRank(peer):
                await transport.disconnect(peer)
            case CloseRank():
                await transport.close()
        return None

    async def _report(self) -> None:
        while True:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._pause_s())
            block_ids = self._transport.settled()
            if block_ids:
                write_message(self._writer, Settled(tuple(block_ids)))
            card = _timeless(self._transport.unsigned_card(b""))
            if card != self._card:
                self._card = card
                write_message(self._writer, CardChanged(card))
            if self._transport.num_recycles != self._num_recycles:
                self._num_recycles = self._transport.num_recycles
                write_message(self._writer, Recycled(self._num_recycles))

    def _pause_s(self) -> float:
        if not self._num_fast_polls:
            return POLL_S
        self._num_fast_polls -= 1
        return FAST_POLL_S


def _timeless(card: PeerCard) -> PeerCard:
    """Rank 0 signs it with a nonce and times of its own."""
    return replace(card, issued_at_s=0.0, expires_at_s=0.0)
