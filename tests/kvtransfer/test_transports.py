"""Real transports between two processes: NIXL and shared memory, held to the same behaviour."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import threading
import time

import pytest

from baton.core.errors import (
    BadPeerCard,
    IncompatiblePeer,
    PeerGone,
    TransferError,
    TransferTimeout,
)
from baton.core.kv_layout import KvLayout
from kvtransfer.block_read import MoverLimits
from kvtransfer.metadata import SocketEndpoint, open_card, seal_card

SECRET = b"secret"
NONCE = b"nonce of the test"
SEED = 1000


def resealed(card: bytes, **changes: object) -> bytes:
    """A correctly signed card with other contents."""
    opened = open_card(card, SECRET, now_s=time.time(), nonce=NONCE)
    return seal_card(dataclasses.replace(opened, **changes), SECRET)


def other_process(card: bytes) -> bytes:
    """The card of a process whose place another one has taken."""
    endpoints = open_card(card, SECRET, now_s=time.time(), nonce=NONCE).endpoints
    changed = tuple(
        e if isinstance(e, SocketEndpoint) else dataclasses.replace(e, canary=bytes(32))
        for e in endpoints
    )
    return resealed(card, endpoints=changed, epoch="e2")


async def test_scattered_blocks_are_read_right_and_nothing_else_is_touched(
    kind, peers, make_pool, open_transport
):
    rng = random.Random(3)
    pool = make_pool(kind, 64)
    peer = peers.start(kind, num_blocks=96, seed=SEED)
    transport = open_transport(kind, pool)
    assert await transport.connect(peer.card, nonce=NONCE) == ("prefill-0", "e1")
    free = list(range(64))
    rng.shuffle(free)
    pairs: list[tuple[list[int], list[int]]] = []
    for count in (1, 7, 20):
        remote = rng.sample(range(96), count)
        pairs.append((remote, [free.pop() for _ in remote]))
    pairs.append((list(range(40, 48)), sorted(free[:8])))
    stats = await asyncio.gather(
        *(transport.read(peer.worker_id, r, q, timeout_s=5) for r, q in pairs)
    )
    for (remote, local), read in zip(pairs, stats, strict=True):
        assert pool.holds(local, remote, SEED)
        assert read.num_bytes == len(remote) * pool.region.layout.block_bytes
        assert 1 <= read.num_descriptors <= len(remote)
        assert read.seconds > 0
    used = {q for _, local in pairs for q in local}
    assert pool.untouched([b for b in range(64) if b not in used])
    assert transport.settled() == []


async def test_read_larger_than_a_piece_arrives_whole(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 64)
    peer = peers.start(kind)
    limits = MoverLimits(max_bytes_in_flight=2 << 20, max_piece_bytes=1 << 20)
    transport = open_transport(kind, pool, limits=limits)
    await transport.connect(peer.card, nonce=NONCE)
    ids = list(range(64))
    stats = await transport.read(peer.worker_id, ids, ids, timeout_s=5)
    assert pool.holds(ids, ids, SEED) and stats.num_bytes == pool.region.num_bytes


async def test_peer_killed_mid_read_is_gone(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 64)
    peer = peers.start(kind)
    # Small pieces make one read long enough to be hit in the middle.
    limits = MoverLimits(max_bytes_in_flight=1 << 20, max_piece_bytes=400_000)
    transport = open_transport(kind, pool, limits=limits)
    await transport.connect(peer.card, nonce=NONCE)
    ids = list(range(64))
    await transport.read(peer.worker_id, ids, ids, timeout_s=5)

    async def read_on():
        while True:
            await transport.read(peer.worker_id, ids * 8, ids * 8, timeout_s=5)

    reading = asyncio.create_task(read_on())
    await asyncio.sleep(0.05)
    started_s = time.monotonic()
    peer.kill()
    with pytest.raises(PeerGone):
        await asyncio.wait_for(reading, 5)
    assert time.monotonic() - started_s < 3
    with pytest.raises(PeerGone):
        await transport.read(peer.worker_id, [0], [0], timeout_s=1)
    assert transport.settled() == []


async def test_restart_under_the_same_name_replaces_the_old_epoch(
    kind, peers, make_pool, open_transport
):
    pool = make_pool(kind, 8)
    transport = open_transport(kind, pool)
    old = peers.start(kind, epoch="e1", seed=1)
    await transport.connect(old.card, nonce=NONCE)
    await transport.read(old.worker_id, [0], [0], timeout_s=5)
    old.kill()
    new = peers.start(kind, epoch="e2", seed=2)
    assert await transport.connect(new.card, nonce=NONCE) == ("prefill-0", "e2")
    await transport.read(new.worker_id, [3], [1], timeout_s=5)
    assert pool.holds([0], [0], 1) and pool.holds([1], [3], 2)
    with pytest.raises(PeerGone):
        await transport.connect(old.card, nonce=NONCE)
    await transport.read(new.worker_id, [4], [2], timeout_s=5)
    assert pool.holds([2], [4], 2)


async def test_second_live_process_takes_over_the_name(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 8)
    transport = open_transport(kind, pool)
    old = peers.start(kind, epoch="e1", seed=1)
    new = peers.start(kind, epoch="e2", seed=2)
    await transport.connect(old.card, nonce=NONCE)
    await transport.connect(old.card, nonce=NONCE)
    await transport.connect(new.card, nonce=NONCE)
    await transport.read(new.worker_id, [3], [1], timeout_s=5)
    assert pool.holds([1], [3], 2)


async def test_bad_cards_are_refused_and_leave_a_good_peer_alone(
    kind, peers, make_pool, open_transport
):
    pool = make_pool(kind, 8)
    peer = peers.start(kind)
    transport = open_transport(kind, pool)
    await transport.connect(peer.card, nonce=NONCE)
    forged = peer.card[:-1] + bytes([peer.card[-1] ^ 1])
    for bad in (forged, peer.card[:-40], b"", resealed(peer.card, expires_at_s=1.0)):
        with pytest.raises(BadPeerCard):
            await transport.connect(bad, nonce=NONCE)
    layout = KvLayout("other-model", 30, 3, 64, 16, "bfloat16")
    refused = {
        "model_id: test-model here, other-model there": resealed(peer.card, layout=layout),
        f"{kind}: prefill-0 does not offer it": resealed(peer.card, endpoints=()),
        "own name": transport.card(NONCE),
    }
    if kind != "socket":
        refused |= {
            "another host": resealed(peer.card, host_id="elsewhere"),
            "another pid namespace": resealed(peer.card, pid_namespace="pid:[1]"),
        }
    for reason, card in refused.items():
        with pytest.raises(IncompatiblePeer) as caught:
            await transport.connect(card, nonce=NONCE)
        assert reason in str(caught.value)
    with pytest.raises(
        PeerGone, match=r"not prefill-0 any more|epoch e1, not prefill-0 in epoch e2"
    ):
        await transport.connect(other_process(peer.card), nonce=NONCE)
    await transport.read(peer.worker_id, [5], [5], timeout_s=5)
    assert pool.holds([5], [5], SEED)


async def test_ids_outside_either_pool_are_refused(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 8)
    peer = peers.start(kind, num_blocks=16)
    transport = open_transport(kind, pool)
    await transport.connect(peer.card, nonce=NONCE)
    for remote, local in (([16], [0]), ([0], [8]), ([-1], [0]), ([0, 1], [0])):
        with pytest.raises(TransferError):
            await transport.read(peer.worker_id, remote, local, timeout_s=1)
    assert (await transport.read(peer.worker_id, [], [], timeout_s=1)).num_bytes == 0
    assert pool.untouched(list(range(8)))


async def test_cancelled_read_settles_all_its_blocks(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 64)
    peer = peers.start(kind)
    transport = open_transport(kind, pool)
    await transport.connect(peer.card, nonce=NONCE)
    ids = list(range(64))
    reading = asyncio.create_task(transport.read(peer.worker_id, ids, ids, timeout_s=5))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    settled: list[int] = []
    deadline_s = time.monotonic() + 5
    while len(settled) < 64 and time.monotonic() < deadline_s:
        await asyncio.sleep(0.01)
        settled += transport.settled()
    assert sorted(settled) == ids


async def test_disconnected_peer_is_gone_until_it_is_connected_again(
    kind, peers, make_pool, open_transport
):
    pool = make_pool(kind, 8)
    peer = peers.start(kind)
    transport = open_transport(kind, pool)
    await transport.connect(peer.card, nonce=NONCE)
    await transport.read(peer.worker_id, [0], [0], timeout_s=5)
    await transport.disconnect(peer.worker_id)
    await transport.disconnect(peer.worker_id)
    with pytest.raises(PeerGone):
        await transport.read(peer.worker_id, [0], [1], timeout_s=1)
    await transport.connect(peer.card, nonce=NONCE)
    await transport.read(peer.worker_id, [2], [1], timeout_s=5)
    assert pool.holds([1], [2], SEED)


async def test_connected_transport_is_idle(kind, peers, make_pool, open_transport):
    pool = make_pool(kind, 8)
    peer = peers.start(kind)
    transport = open_transport(kind, pool)
    await transport.connect(peer.card, nonce=NONCE)
    await transport.read(peer.worker_id, [0], [0], timeout_s=5)
    cpu_s = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - cpu_s < 0.05


@pytest.mark.nixl
async def test_read_of_a_stopped_peer_is_quarantined_and_settles_when_it_wakes(
    peers, make_pool, open_transport
):
    pool = make_pool("nixl", 16)
    peer = peers.start("nixl")
    transport = open_transport("nixl", pool, limits=MoverLimits(max_quarantined_ratio=1.0))
    await transport.connect(peer.card, nonce=NONCE)
    # Before the first contact: later UCX reads a stopped process without its help.
    peer.signal(signal.SIGSTOP)
    ids = list(range(8))
    started_s = time.monotonic()
    with pytest.raises(TransferTimeout):
        await transport.read(peer.worker_id, ids, ids, timeout_s=0.3)
    assert 0.25 < time.monotonic() - started_s < 1.0
    assert transport.settled() == []
    peer.signal(signal.SIGCONT)
    settled: list[int] = []
    deadline_s = time.monotonic() + 5
    while len(settled) < 8 and time.monotonic() < deadline_s:
        await asyncio.sleep(0.01)
        settled += transport.settled()
    assert sorted(settled) == ids and transport.num_recycles == 0
    assert pool.holds(ids, ids, SEED)


@pytest.mark.nixl
async def test_recycle_settles_at_once_and_keeps_all_peers(peers, make_pool, open_transport):
    pool = make_pool("nixl", 64)
    peer, healthy = peers.start("nixl"), peers.start("nixl", "prefill-1", seed=5)
    transport = open_transport("nixl", pool, limits=MoverLimits(max_quarantined_ratio=1.0))
    await transport.connect(peer.card, nonce=NONCE)
    await transport.connect(healthy.card, nonce=NONCE)
    await transport.read(healthy.worker_id, [0], [63], timeout_s=5)
    peer.signal(signal.SIGSTOP)
    ids = list(range(32))
    with pytest.raises(TransferTimeout):
        await transport.read(peer.worker_id, ids, ids, timeout_s=0.2)
    await asyncio.wait_for(transport.recycle(), 5)
    assert sorted(transport.settled()) == ids and transport.num_recycles == 1
    pool.clear()
    peer.signal(signal.SIGCONT)
    await asyncio.sleep(0.3)
    assert pool.untouched(ids)
    # Both peers are connected to the new agent without being asked again.
    await transport.read(healthy.worker_id, [1], [62], timeout_s=5)
    await transport.read(peer.worker_id, [1], [61], timeout_s=5)
    assert pool.holds([62], [1], 5) and pool.holds([61], [1], SEED)


@pytest.mark.nixl
async def test_recycle_settles_nothing_while_the_old_agent_may_live(
    peers, make_pool, open_transport
):
    pool = make_pool("nixl", 8)
    peer = peers.start("nixl")
    limits = MoverLimits(max_quarantined_ratio=1.0, recycle_pause_s=0.0)
    transport = open_transport("nixl", pool, limits=limits)
    await transport.connect(peer.card, nonce=NONCE)
    peer.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        await transport.read(peer.worker_id, [0], [0], timeout_s=0.2)
    kept = transport._links.links[0]._reader.core.agent
    for _ in range(2):
        with pytest.raises(TransferError, match="still referenced"):
            await transport.recycle()
        assert transport.settled() == []
    del kept
    await transport.recycle()
    assert transport.settled() == [0]
    peer.signal(signal.SIGCONT)
    await transport.read(peer.worker_id, [1], [1], timeout_s=5)
    assert pool.holds([1], [1], SEED)


@pytest.mark.nixl
async def test_too_much_quarantine_recycles_by_itself(peers, make_pool, open_transport):
    pool = make_pool("nixl", 64)
    peer = peers.start("nixl")
    transport = open_transport("nixl", pool, limits=MoverLimits(max_quarantined_ratio=0.05))
    await transport.connect(peer.card, nonce=NONCE)
    peer.signal(signal.SIGSTOP)
    ids = list(range(8))
    with pytest.raises(TransferTimeout):
        await transport.read(peer.worker_id, ids, ids, timeout_s=0.2)
    settled: list[int] = []
    deadline_s = time.monotonic() + 5
    while len(settled) < 8 and time.monotonic() < deadline_s:
        await asyncio.sleep(0.01)
        settled += transport.settled()
    assert sorted(settled) == ids and transport.num_recycles == 1
    pool.clear()
    peer.signal(signal.SIGCONT)
    await asyncio.sleep(0.2)
    assert pool.untouched(ids)


@pytest.mark.nixl
@pytest.mark.parametrize("recycles", [True, False])
def test_recycle_is_a_hard_cancel(peers, recycles):
    """No late write comes after it; without it every block is written late."""
    peer = peers.start("nixl-tcp", num_blocks=32)
    peer.signal(signal.SIGSTOP)
    reader = peers.start_reader(peer, "recycle" if recycles else "wait")
    assert reader.line() == "given up"
    peer.signal(signal.SIGCONT)
    assert reader.line() == f"late writes {0 if recycles else 32}"


async def test_stopped_peer_does_not_hinder_reads_of_shared_memory(
    peers, make_pool, open_transport
):
    pool = make_pool("shm", 8)
    peer = peers.start("shm")
    transport = open_transport("shm", pool)
    await transport.connect(peer.card, nonce=NONCE)
    peer.signal(signal.SIGSTOP)
    await transport.read(peer.worker_id, [3], [3], timeout_s=1)
    assert pool.holds([3], [3], SEED)


async def test_stopped_owner_costs_a_socket_reader_its_deadline_and_nothing_else(
    peers, make_pool, open_transport
):
    pool = make_pool("socket", 64)
    peer = peers.start("socket")
    limits = MoverLimits(max_bytes_in_flight=2 << 20, max_piece_bytes=1 << 20)
    transport = open_transport("socket", pool, limits=limits)
    await transport.connect(peer.card, nonce=NONCE)
    blocks = list(range(64))
    reading = asyncio.create_task(
        transport.read(peer.worker_id, blocks * 50, blocks * 50, timeout_s=1)
    )
    await asyncio.sleep(0.02)
    peer.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        await reading
    assert transport.settled() == blocks, "nothing can land any more"
    pool.clear()
    peer.signal(signal.SIGCONT)
    await transport.read(peer.worker_id, [3], [3], timeout_s=5)
    assert pool.holds([3], [3], SEED)
    assert pool.untouched([b for b in blocks if b != 3])


async def test_closed_transport_leaves_no_thread_and_no_descriptor(
    kind, peers, make_pool, open_transport
):
    first, second = peers.start(kind), peers.start(kind, "prefill-1")

    async def live() -> None:
        transport = open_transport(kind, pool)
        for peer in (first, second):
            await transport.connect(peer.card, nonce=NONCE)
            await transport.read(peer.worker_id, [1], [1], timeout_s=5)
        await transport.disconnect(first.worker_id)
        await transport.close()

    pool = make_pool(kind, 8, num_scratch_blocks=2)
    # What libraries keep for the life of the process is not a leak.
    await live()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(2):
        await live()
    assert len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() <= threads
