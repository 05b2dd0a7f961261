"""A rank behind a socket: cards that change, calls it does not answer, its loss."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from baton.core.errors import PeerGone, TransferError, TransferTimeout
from baton.core.worker_info import Epoch, WorkerId
from group_ranks import NONCE, SECRET, HandRank, hand_ranks
from kvtransfer import rank_proxy
from kvtransfer.metadata import open_card
from kvtransfer.rank_messages import Failure
from kvtransfer.rank_proxy import RankProxy
from kvtransfer.rank_server import serve_rank

PEER = WorkerId("prefill-0")


@dataclass
class Behind:
    proxy: RankProxy
    rank: HandRank
    server: asyncio.Task[None]
    socket: socket.socket
    """The rank's end."""

    async def lose(self) -> None:
        """As when the process ends: nothing is said any more."""
        self.socket.shutdown(socket.SHUT_RDWR)
        await asyncio.wait_for(self.server, 5)


@pytest.fixture
async def behind() -> AsyncIterator[Behind]:
    (rank,) = hand_ranks(1)
    ours, theirs = socket.socketpair()
    server = asyncio.create_task(serve_rank(theirs, rank))
    proxy = await RankProxy.open(ours, rank=1, secret=SECRET, timeout_s=5.0)
    yield Behind(proxy, rank, server, theirs)
    with contextlib.suppress(TransferError):
        await proxy.close()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(server, 5)
    assert rank.is_closed


async def connect(behind: Behind) -> None:
    (peer,) = hand_ranks(1, worker_id=PEER, epoch="p1")
    answer = await behind.proxy.connect(peer.card(NONCE), nonce=NONCE)
    assert answer == (PEER, Epoch("p1"))


async def start_read(behind: Behind, block: int, timeout_s: float = 5.0) -> asyncio.Task[object]:
    task = asyncio.create_task(
        behind.proxy.read(PEER, [block], [block], timeout_s=timeout_s)  # type: ignore[list-item]
    )
    async with asyncio.timeout(5):
        while not any(read.local == [block] for read in behind.rank.reads):
            await asyncio.sleep(0.001)
    return task


async def test_cards_are_signed_for_each_nonce_and_follow_the_link(behind):
    for nonce in (bytes(16), bytes(range(16))):
        card = open_card(behind.proxy.card(nonce), SECRET, now_s=time.time(), nonce=nonce)
        assert card.pid == 1
    behind.rank.generation = 2
    async with asyncio.timeout(5):
        while card.pid == 1:
            await asyncio.sleep(0.01)
            wire = behind.proxy.card(NONCE)
            card = open_card(wire, SECRET, now_s=time.time(), nonce=NONCE)
    assert card.pid == 2


async def test_a_lost_rank_ends_its_calls_and_settles_what_was_given_up(behind):
    await connect(behind)
    given_up = await start_read(behind, 3)
    given_up.cancel()
    reading = await start_read(behind, 4)
    await behind.lose()
    with pytest.raises(PeerGone, match="rank 1 of this worker is lost"):
        await reading
    assert behind.proxy.settled() == [3]
    assert behind.proxy.settled() == []
    with pytest.raises(PeerGone, match="rank 1 of this worker is lost"):
        await behind.proxy.read(PEER, [1], [1], timeout_s=1.0)


async def test_a_rank_that_does_not_answer_holds_its_blocks(behind, monkeypatch):
    monkeypatch.setattr(rank_proxy, "ANSWER_GRACE_S", 0.0)
    await connect(behind)
    task = await start_read(behind, 3, timeout_s=0.05)
    with pytest.raises(TransferTimeout, match=r"rank 1 of this worker does not answer within 0.05"):
        await task
    assert behind.proxy.settled() == []
    (read,) = behind.rank.reads
    async with asyncio.timeout(5):
        while not read.is_given_up:
            await asyncio.sleep(0.001)
        behind.rank.settle(read)
        while not (found := behind.proxy.settled()):
            await asyncio.sleep(0.001)
    assert found == [3]


async def test_a_process_without_a_transport_is_refused():
    ours, theirs = socket.socketpair()
    with pytest.raises(TransferTimeout, match=r"has opened no KV transport in 0.05 s"):
        await RankProxy.open(ours, rank=2, secret=SECRET, timeout_s=0.05)
    theirs.close()
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(TransferError, match="rank 2 of this worker has no KV transport"):
        await RankProxy.open(ours, rank=2, secret=SECRET, timeout_s=5.0)


def test_errors_keep_their_kind_and_others_only_that():
    assert isinstance(Failure.of(PeerGone("x")).error(), PeerGone)
    assert str(Failure.of(PeerGone("x")).error()) == "x"

    class Odd(TransferTimeout):
        pass

    assert type(Failure.of(Odd("y")).error()) is TransferTimeout
    hidden = Failure.of(ValueError("/some/path")).error()
    assert type(hidden) is TransferError
    assert "/some/path" not in str(hidden)
