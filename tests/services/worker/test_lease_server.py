"""LeaseServer: what the owner decides reaches the engine in an order that leaves nothing leased."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from baton.core.block import BlockHash, BlockId
from baton.core.clock import ManualClock
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch
from baton.engine.engine import ChunkDone
from baton.rpc.v1 import transfer_pb2 as pb
from kvtransfer.messages import (
    ChunkReady,
    Complete,
    Completed,
    Freeze,
    GiveUp,
    LeaseId,
    OwnerMessage,
    ReaderMessage,
    Refused,
    Takeover,
    Watch,
)
from kvtransfer.owner import LeaseOwner, ReaderId
from services.worker.lease_server import LeaseServer
from services.worker.transfer_wire import owner_from_wire, reader_to_wire

R = RequestId("r")
READER = ReaderId("d@e")


class Engine:
    """Leases as soon as a handover starts, as the real one does for blocks that are finished."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.leased: set[RequestId] = set()

    def release_lease(self, request_id: RequestId) -> None:
        self.leased.discard(request_id)

    async def lease_prefix(
        self, lease_id: RequestId, hashes: Sequence[BlockHash]
    ) -> tuple[BlockId, ...]:
        return ()

    async def start_handover(self, request_id: RequestId, *, num_known_tokens: int) -> None:
        self.calls.append("start")
        self.leased.add(request_id)

    def freeze(self, request_id: RequestId) -> None:
        self.calls.append("freeze")

    def resume(self, request_id: RequestId) -> None:
        assert request_id not in self.leased, "resumed under a lease"
        self.calls.append("resume")

    def finish_handover(self, request_id: RequestId) -> None:
        self.calls.append("finish")

    async def ping(self) -> None:
        self.calls.append("ping")


class Context:
    def __init__(self) -> None:
        self.written: list[OwnerMessage | None] = []

    async def write(self, message: pb.OwnerMessage) -> None:
        self.written.append(owner_from_wire(message))
        await asyncio.sleep(0)


class Stream:
    """A reader's stream that the test writes to."""

    def __init__(self, server: LeaseServer) -> None:
        self.context = Context()
        self._messages: asyncio.Queue[pb.ReaderMessage] = asyncio.Queue()
        self.served = asyncio.create_task(
            server.serve(READER, self._read(), cast(Any, self.context))
        )

    def send(self, message: ReaderMessage) -> None:
        self._messages.put_nowait(reader_to_wire(message))

    async def _read(self) -> AsyncIterator[pb.ReaderMessage]:
        while True:
            yield await self._messages.get()

    async def close(self) -> None:
        self.served.cancel()
        await asyncio.gather(self.served, return_exceptions=True)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def chunk(first: int, *, is_last: bool = False) -> ChunkDone:
    token = TokenDelta(R, token_ids=[5]) if is_last else None
    return ChunkDone(R, first, (BlockId(100 + first),), is_last, token)


def made() -> tuple[LeaseOwner, Engine, LeaseServer]:
    owner = LeaseOwner(epoch=Epoch("e"), clock=ManualClock(0.0))
    engine = Engine()
    return owner, engine, LeaseServer(owner, engine=engine)


async def test_takeover_given_up_at_once_leaves_nothing_leased():
    owner, engine, server = made()

    async def messages() -> AsyncIterator[pb.ReaderMessage]:
        # Both are read before anything else has its turn.
        yield reader_to_wire(Takeover(R, 0))
        yield reader_to_wire(GiveUp(R, "changed its mind"))

    await server.serve(READER, messages(), cast(Any, Context()))
    await settle()
    assert engine.calls == ["start", "resume", "ping"]
    assert not engine.leased and owner.is_empty


async def test_new_stream_hears_of_a_request_only_after_it_has_asked_again():
    """The old one is still open here: the network between the two was cut, not closed."""
    owner, _engine, server = made()
    old = Stream(server)
    old.send(Watch(R))
    await settle()
    # On its way when the network was cut; the reader never gets it.
    server.announce(chunk(0))
    new = Stream(server)
    await settle()
    server.announce(chunk(1))
    await settle()
    assert new.context.written == [], "it would look like a gap"
    new.send(Watch(R))
    await settle()
    (whole,) = new.context.written
    assert isinstance(whole, ChunkReady)
    assert (whole.first_block_index, len(whole.block_ids)) == (0, 2)
    server.announce(chunk(2, is_last=True))
    await settle()
    new.send(Complete(whole.lease_id, Epoch("e")))
    await settle()
    assert new.context.written[-1] == Completed(whole.lease_id, True)
    await old.close()
    await new.close()
    assert owner.is_empty


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_frozen_request_goes_on_when_its_readers_stream_breaks(is_replaced):
    owner, engine, server = made()
    stream = Stream(server)
    stream.send(Takeover(R, 0))
    await settle()
    server.announce(chunk(0))
    stream.send(Freeze(R))
    await settle()
    server.announce(chunk(1, is_last=True))
    if is_replaced:
        newer = Stream(server)
    else:
        await stream.close()
    await settle()
    assert engine.calls == ["start", "freeze", "resume", "ping"]
    assert owner.is_empty and not engine.leased
    await (newer if is_replaced else stream).close()


async def test_every_refusal_is_logged_with_its_reason(caplog):
    caplog.set_level(logging.INFO)
    owner, _engine, server = made()
    stream = Stream(server)
    stream.send(Freeze(R))
    stream.send(Complete(LeaseId("made up"), Epoch("e")))
    await settle()
    assert [type(message) for message in stream.context.written] == [Refused, Completed]
    assert "request r of d@e refused: this reader takes no such request over" in caplog.text
    assert "d@e asked for a lease that is over, or not its own" in caplog.text
    stream.send(Watch(R))
    await settle()
    server.announce(chunk(0))
    stream.send(GiveUp(R, "block 100 is outside the pool"))
    await settle()
    assert "lease of r released: reader gave up: block 100 is outside the pool" in caplog.text
    await stream.close()
    assert owner.num_leases == 0
