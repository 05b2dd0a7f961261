"""A link whose stream breaks, and one that follows another which is slow to end."""

from __future__ import annotations

import asyncio

from baton.core.errors import PeerGone
from baton.core.request import PeerRef, RequestId
from baton.core.worker_info import Epoch, Role
from kvtransfer.messages import GiveUp, ReaderMessage, Watch
from services.worker import peer_link
from services.worker.peer_link import (
    FIRST_PAUSE_S,
    MAX_PAUSE_S,
    STEADY_S,
    LinkState,
    PeerLink,
    next_pause_s,
)


class Listener:
    def __init__(self):
        self.gone: list[Epoch] = []

    def on_message(self, peer, message):
        pass

    def on_open(self, peer):
        pass

    def on_broken(self, peer):
        pass

    def on_restored(self, peer):
        pass

    def on_gone(self, peer, error):
        self.gone.append(peer.epoch)


class SlowTransport:
    """The reader's transport, told apart from the real one by a peer that answers late."""

    def __init__(self, transport):
        self._transport = transport
        self.connecting = asyncio.Event()
        self.go_on = asyncio.Event()
        self.disconnected = 0

    def card(self, nonce):
        return self._transport.card(nonce)

    async def connect(self, card, *, nonce):
        known = await self._transport.connect(card, nonce=nonce)
        self.connecting.set()
        while not self.go_on.is_set():
            # A call on another thread does not end when it is cancelled.
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                continue
        return known

    async def disconnect(self, peer):
        self.disconnected += 1
        await self._transport.disconnect(peer)


async def test_late_end_of_a_replaced_link_does_not_cut_its_successor(workers, monkeypatch):
    monkeypatch.setattr(peer_link, "CLOSE_TIMEOUT_S", 0.1)
    prefill = await workers.start(Role.PREFILL)
    decode = await workers.start(Role.DECODE)
    transport = decode.server._backend.transport
    slow, listener = SlowTransport(transport), Listener()
    before = PeerRef(prefill.peer.worker_id, Epoch("before"), prefill.peer.address)

    def open_link(peer, over, predecessor=None):
        return PeerLink(
            peer,
            myself=decode.info,
            transport=over,
            listener=listener,
            connect_timeout_s=2.0,
            predecessor=predecessor,
        )

    old = open_link(before, slow)
    await asyncio.wait_for(slow.connecting.wait(), 5)
    new = open_link(prefill.peer, transport, predecessor=old)
    await asyncio.wait_for(new.ready(), 5)
    slow.go_on.set()
    async with asyncio.timeout(5):
        while old.state is not LinkState.GONE:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert (slow.disconnected, listener.gone) == (0, [Epoch("before")])
    assert (await transport.read(prefill.peer.worker_id, [0], [0], timeout_s=2)).num_bytes
    await new.close()
    try:
        await transport.read(prefill.peer.worker_id, [0], [0], timeout_s=2)
    except PeerGone:
        return
    raise AssertionError("a closed link leaves no peer behind")


async def test_what_is_given_up_while_the_stream_is_broken_is_told_on_the_next(
    workers, monkeypatch, wait_for
):
    monkeypatch.setattr(peer_link, "FIRST_PAUSE_S", 0.3)
    owner = await workers.start(Role.PREFILL)
    reader = await workers.start(Role.DECODE)
    received: list[ReaderMessage] = []
    leases = owner.server.parts.leases
    receive = leases._owner.receive
    monkeypatch.setattr(
        leases._owner,
        "receive",
        lambda name, message: received.append(message) or receive(name, message),
    )
    link = PeerLink(
        owner.peer,
        myself=reader.info,
        transport=reader.server._backend.transport,
        listener=Listener(),
        connect_timeout_s=2.0,
    )
    await wait_for(lambda: leases._streams and link.state is LinkState.READY)
    leases.close()
    await wait_for(lambda: link.state is LinkState.RECONNECTING)
    link.send(Watch(RequestId("asked again by its fetch")))
    link.send(GiveUp(RequestId("a"), "cancelled"))
    await wait_for(lambda: link.state is LinkState.READY)
    link.send(Watch(RequestId("b")))
    await wait_for(lambda: len(received) == 2)
    # In order: the same request may be asked for anew.
    assert received == [GiveUp(RequestId("a"), "cancelled"), Watch(RequestId("b"))]
    await link.close()


def test_streams_that_keep_breaking_are_made_anew_ever_more_slowly():
    pauses = [next_pause_s(0.0, 0.0)]
    for _ in range(10):
        pauses.append(next_pause_s(pauses[-1], 0.0))
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (FIRST_PAUSE_S, MAX_PAUSE_S)
    assert next_pause_s(MAX_PAUSE_S, STEADY_S) == 0.0
