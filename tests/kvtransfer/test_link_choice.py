"""Which link a peer is read by, how fast it was found to be, and what is said of the others."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import time

import pytest

from baton.core.errors import IncompatiblePeer, PeerGone, TransferError, TransferTimeout
from kvtransfer import mover_transport, nixl_transport, shm_transport
from kvtransfer.block_read import MoverLimits
from kvtransfer.metadata import NixlEndpoint, ShmEndpoint, open_card, seal_card
from kvtransfer.nixl_library import is_installed

SECRET = b"secret"
NONCE = b"nonce of the test"
SEED = 1000
needs_nixl = pytest.mark.skipif(not is_installed(), reason="NIXL is not installed")


def resealed(card: bytes, **changes: object) -> bytes:
    opened = open_card(card, SECRET, now_s=time.time(), nonce=NONCE)
    return seal_card(dataclasses.replace(opened, **changes), SECRET)


def forbidden(*args: object) -> bytes:
    raise PermissionError(1, "Operation not permitted")


def unopenable(*args: object, **kwargs: object) -> int:
    raise PermissionError(13, "Permission denied")


async def expect_reads(transport, pool, peer) -> None:
    await transport.read(peer, [5, 9], [2, 1], timeout_s=5)
    assert pool.holds([2, 1], [5, 9], SEED)


@pytest.mark.nixl
@needs_nixl
async def test_mapped_memory_comes_first_and_its_speed_is_known(
    peers, make_pool, open_transport, caplog
):
    caplog.set_level(logging.INFO)
    pool = make_pool("auto", 16, num_scratch_blocks=4)
    transport = open_transport("auto", pool)
    peer, _ = await transport.connect(peers.start("auto").card, nonce=NONCE)
    link = transport.link(peer)
    assert (link.transport, link.lane, link.reason) == ("shm", "mapped memory", "")
    assert link.bytes_per_second > 1e6 and 0 < link.latency_s < 2
    assert (link.peer_id, link.peer_epoch) == ("prefill-0", "e1")
    assert "prefill-0 is read by shm (mapped memory)" in caplog.text
    assert pool.untouched(list(range(12))), "timed reads go to scratch blocks alone"
    assert not pool.untouched([12]) and transport.settled() == []
    await expect_reads(transport, pool, peer)
    assert transport.link("nobody") is None


@pytest.mark.nixl
@needs_nixl
async def test_memory_whose_file_cannot_be_opened_is_read_by_nixl(
    peers, make_pool, open_transport, monkeypatch
):
    pool = make_pool("auto", 16, num_scratch_blocks=4)
    transport = open_transport("auto", pool)
    peer = peers.start("auto")
    with monkeypatch.context() as without_files:
        without_files.setattr(shm_transport.os, "open", unopenable)
        name, _ = await transport.connect(peer.card, nonce=NONCE)
    link = transport.link(name)
    assert (link.transport, link.lane) == ("nixl", "cma")
    assert "shm: memory of prefill-0 cannot be opened" in link.reason
    assert "run both workers as the same user" in link.reason
    await expect_reads(transport, pool, name)


@pytest.mark.nixl
@needs_nixl
async def test_forbidden_memory_is_not_read_by_nixl(peers, make_pool, open_transport, monkeypatch):
    transport = open_transport("nixl", make_pool("auto", 16, num_scratch_blocks=4))
    monkeypatch.setattr(nixl_transport, "read_memory", forbidden)
    with pytest.raises(IncompatiblePeer) as caught:
        await transport.connect(peers.start("auto").card, nonce=NONCE)
    assert "nixl: memory of prefill-0 may not be read (process_vm_readv: EPERM)" in str(
        caught.value
    )
    assert "ptrace_scope" in str(caught.value)


async def test_peer_that_shares_nothing_is_read_over_tcp(peers, make_pool, open_transport):
    pool = make_pool("auto", 16, num_scratch_blocks=4)
    transport = open_transport("auto", pool)
    card = resealed(peers.start("auto").card, host_id="elsewhere")
    peer, _ = await transport.connect(card, nonce=NONCE)
    link = transport.link(peer)
    assert (link.transport, link.lane) == ("socket", "tcp")
    assert "shm: prefill-0 runs on another host" in link.reason
    assert link.bytes_per_second > 1e6
    await expect_reads(transport, pool, peer)


@pytest.mark.nixl
@needs_nixl
async def test_named_transport_of_the_peer_limits_the_choice(peers, make_pool, open_transport):
    pool = make_pool("auto", 16, num_scratch_blocks=4)
    transport = open_transport("auto", pool)
    for kind in ("nixl", "socket"):
        card = peers.start(kind, f"{kind}-peer").card
        peer, _ = await transport.connect(card, nonce=NONCE)
        assert transport.link(peer).transport == kind
        assert f"{kind}-peer does not offer it" in transport.link(peer).reason
        await expect_reads(transport, pool, peer)


async def test_named_transport_of_the_reader_limits_the_choice(peers, make_pool, open_transport):
    pool = make_pool("socket", 16, num_scratch_blocks=4)
    transport = open_transport("socket", pool)
    peer, _ = await transport.connect(peers.start("auto").card, nonce=NONCE)
    assert transport.link(peer).transport == "socket" and transport.link(peer).reason == ""
    await expect_reads(transport, pool, peer)
    shm_only = peers.start("shm", "prefill-1")
    with pytest.raises(
        IncompatiblePeer, match="reaches prefill-1: socket: prefill-1 does not offer it"
    ):
        await transport.connect(shm_only.card, nonce=NONCE)


async def test_no_way_at_all_names_every_reason(peers, make_pool, open_transport, monkeypatch):
    pool = make_pool("auto", 16, num_scratch_blocks=4)
    transport = open_transport("auto", pool)
    card = peers.start("auto").card
    opened = open_card(card, SECRET, now_s=time.time(), nonce=NONCE)
    endpoints = tuple(e for e in opened.endpoints if isinstance(e, NixlEndpoint | ShmEndpoint))
    monkeypatch.setattr(nixl_transport, "read_memory", forbidden)
    monkeypatch.setattr(shm_transport.os, "open", unopenable)
    with pytest.raises(IncompatiblePeer) as caught:
        await transport.connect(resealed(card, endpoints=endpoints), nonce=NONCE)
    for reason in ("no KV transport reaches prefill-0", "shm: memory of prefill-0 cannot be"):
        assert reason in str(caught.value)
    assert "socket: prefill-0 does not offer it" in str(caught.value)
    assert transport.link(opened.worker_id) is None


async def test_dead_process_is_gone_whatever_the_transport(peers, make_pool, open_transport):
    transport = open_transport("auto", make_pool("auto", 8, num_scratch_blocks=2))
    peer = peers.start("auto")
    peer.kill()
    with pytest.raises(PeerGone, match=r"socket: .*ECONNREFUSED"):
        await transport.connect(peer.card, nonce=NONCE)


@pytest.mark.nixl
@needs_nixl
async def test_peer_that_does_not_answer_its_timed_read_gets_the_next_link(
    peers, make_pool, open_transport, monkeypatch
):
    """A stopped process whose file is out of reach: NIXL cannot begin, no other link is left."""
    monkeypatch.setattr(mover_transport, "TIMED_READ_TIMEOUT_S", 0.3)
    pool = make_pool("auto", 64, num_scratch_blocks=2)
    transport = open_transport("auto", pool, limits=MoverLimits(max_quarantined_ratio=1.0))
    peer = peers.start("auto")
    peer.signal(signal.SIGSTOP)
    with monkeypatch.context() as without_files:
        without_files.setattr(shm_transport.os, "open", unopenable)
        with pytest.raises(PeerGone) as caught:
            await transport.connect(peer.card, nonce=NONCE)
    assert "nixl: read of 368640 bytes from prefill-0 passed its dead" in str(caught.value)
    name, _ = await transport.connect(peer.card, nonce=NONCE)
    assert transport.link(name).transport == "shm"
    await expect_reads(transport, pool, name)
    peer.signal(signal.SIGCONT)
    await asyncio.sleep(0.2)
    assert transport.settled() == [], "nobody was told of scratch blocks"
    assert pool.untouched(list(range(3, 62)))


async def test_link_is_measured_again(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 16, num_scratch_blocks=4)
    transport = open_transport(kind, pool)
    peer, _ = await transport.connect(peers.start(kind).card, nonce=NONCE)
    first = transport.link(peer)
    again = await transport.measure(peer, num_rounds=5, timeout_s=5)
    assert again == transport.link(peer) and again.bytes_per_second > 1e6
    assert dataclasses.replace(again, bytes_per_second=0, latency_s=0) == dataclasses.replace(
        first, bytes_per_second=0, latency_s=0
    )
    with pytest.raises(PeerGone):
        await transport.measure("nobody", num_rounds=1, timeout_s=1)
    with pytest.raises(TransferError, match="0 rounds"):
        await transport.measure(peer, num_rounds=0, timeout_s=1)
    assert pool.untouched(list(range(12)))


async def test_scratch_blocks_are_nobodys_target(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 16, num_scratch_blocks=4)
    transport = open_transport(kind, pool)
    peer, _ = await transport.connect(peers.start(kind).card, nonce=NONCE)
    with pytest.raises(TransferError, match="block id 12 is outside the local pool of 12"):
        await transport.read(peer, [0], [12], timeout_s=1)


async def test_connections_made_at_once_share_one_link(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 16, num_scratch_blocks=2)
    transport = open_transport(kind, pool)
    first, second = peers.start(kind), peers.start(kind, "prefill-1")
    connected = await asyncio.gather(
        *(transport.connect(p.card, nonce=NONCE) for p in (first, second, first, second, first))
    )
    assert {peer for peer, _ in connected} == {"prefill-0", "prefill-1"}
    for peer in ("prefill-0", "prefill-1"):
        await expect_reads(transport, pool, peer)
        pool.clear()


async def test_connect_that_is_cancelled_leaves_nothing_behind(
    kind, peers, make_pool, open_transport
):
    pool = make_pool(kind, 16, num_scratch_blocks=2)
    transport = open_transport(kind, pool)
    peer = peers.start(kind)
    for delay_s in (0, 0.001, 0.01, 0.03):
        connecting = asyncio.create_task(transport.connect(peer.card, nonce=NONCE))
        await asyncio.sleep(delay_s)
        connecting.cancel()
        outcome = (await asyncio.gather(connecting, return_exceptions=True))[0]
        if isinstance(outcome, asyncio.CancelledError):
            with pytest.raises(PeerGone):
                await transport.read(peer.worker_id, [0], [0], timeout_s=1)
        else:
            await transport.disconnect(peer.worker_id)
    await transport.connect(peer.card, nonce=NONCE)
    await expect_reads(transport, pool, peer.worker_id)
    assert transport.settled() == []


async def test_counters_tell_reads_and_failures(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 16)
    transport = open_transport(kind, pool)
    peer = peers.start(kind)
    await transport.connect(peer.card, nonce=NONCE)
    await transport.read(peer.worker_id, [1, 2], [1, 2], timeout_s=5)
    peer.kill()
    with pytest.raises((PeerGone, TransferTimeout)):
        await transport.read(peer.worker_id, [1, 2], [1, 2], timeout_s=5)
    counters = transport.counters
    assert (counters.reads, counters.failed_reads, counters.recycles) == (1, 1, 0)
    assert counters.read_bytes == 2 * pool.region.layout.block_bytes
