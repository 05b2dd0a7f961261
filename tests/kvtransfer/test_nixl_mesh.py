"""Many NIXL peers that read from one another: what one does to its agent concerns no other."""

from __future__ import annotations

import asyncio
import itertools
import signal

import numpy as np
import pytest

from baton.core.errors import PeerGone, TransferTimeout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.block_read import MoverLimits
from kvtransfer.metadata import PeerIdentity
from kvtransfer.nixl_library import is_installed
from kvtransfer.select import create_transport

pytestmark = [
    pytest.mark.nixl,
    pytest.mark.skipif(not is_installed(), reason="NIXL is not installed"),
]
NONCE = b"nonce of the test"
LIMITS = MoverLimits(max_quarantined_ratio=1.0)


async def settled_of(transport, count: int) -> list[int]:
    settled: list[int] = []
    async with asyncio.timeout(5):
        while len(settled) < count:
            await asyncio.sleep(0.01)
            settled += transport.settled()
    return sorted(settled)


async def test_recycle_of_one_breaks_no_other_and_moves_no_card(make_pool):
    names = ("a", "b", "c")
    pools = {name: make_pool("nixl", 8, num_scratch_blocks=2) for name in names}
    for number, pool in enumerate(pools.values()):
        pool.words[:] = (np.arange(8, dtype=np.uint32) + np.uint32(number * 100))[:, None]
    transports = {
        name: create_transport(
            "nixl", pools[name].region, PeerIdentity(WorkerId(name), Epoch("e")), b"secret"
        )
        for name in names
    }
    pairs = list(itertools.permutations(names, 2))
    for reader, owner in pairs:
        await transports[reader].connect(transports[owner].card(NONCE), nonce=NONCE)
    for turn in range(3):
        for block, (reader, owner) in enumerate(pairs):
            await transports[reader].read(owner, [block], [block], timeout_s=5)
            assert pools[reader].holds([block], [block], names.index(owner) * 100)
            pools[reader].words[block] = names.index(reader) * 100 + block
        await transports[names[turn]].recycle()
    assert [t.num_recycles for t in transports.values()] == [1, 1, 1]
    for transport in transports.values():
        assert transport.settled() == []
        await transport.close()


async def test_peer_that_is_dropped_keeps_its_reads_in_quarantine(peers, make_pool, open_transport):
    """Its agent removed, NIXL calls them failed although they land when the process goes on."""
    pool = make_pool("nixl", 16)
    transport = open_transport("nixl", pool, limits=LIMITS)
    peer = peers.start("nixl")
    await transport.connect(peer.card, nonce=NONCE)
    peer.signal(signal.SIGSTOP)
    blocks = list(range(8))
    with pytest.raises(TransferTimeout):
        await transport.read(peer.worker_id, blocks, blocks, timeout_s=0.2)
    await transport.disconnect(peer.worker_id)
    await asyncio.sleep(0.3)
    assert transport.settled() == [], "the process lives and may be read from later"
    peer.signal(signal.SIGCONT)
    assert await settled_of(transport, 8) == blocks
    pool.clear()
    await asyncio.sleep(0.2)
    assert pool.untouched(blocks)


async def test_dropped_peer_is_taken_up_again_while_its_old_reads_hang(
    peers, make_pool, open_transport
):
    pool = make_pool("nixl", 16)
    transport = open_transport("nixl", pool, limits=LIMITS)
    peer, other = peers.start("nixl"), peers.start("nixl", "prefill-1", seed=5)
    await transport.connect(peer.card, nonce=NONCE)
    await transport.connect(other.card, nonce=NONCE)
    peer.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        await transport.read(peer.worker_id, [1], [1], timeout_s=0.2)
    await transport.disconnect(peer.worker_id)
    await transport.connect(peer.card, nonce=NONCE)
    # Reads of others are not held up by what hangs.
    for block in range(8, 12):
        await transport.read(other.worker_id, [block], [block], timeout_s=1)
    peer.signal(signal.SIGCONT)
    assert await settled_of(transport, 1) == [1]
    await transport.read(peer.worker_id, [2], [2], timeout_s=5)
    assert pool.holds([2], [2], 1000) and transport.num_recycles == 0


async def test_owner_killed_after_its_reads_were_given_up_settles_them(
    peers, make_pool, open_transport
):
    pool = make_pool("nixl", 16)
    transport = open_transport("nixl", pool, limits=LIMITS)
    peer = peers.start("nixl")
    await transport.connect(peer.card, nonce=NONCE)
    peer.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        await transport.read(peer.worker_id, [1, 2], [1, 2], timeout_s=0.2)
    peer.kill()
    assert await settled_of(transport, 2) == [1, 2]
    with pytest.raises(PeerGone):
        await transport.read(peer.worker_id, [1], [1], timeout_s=1)
    assert transport.num_recycles == 0


async def test_successor_of_a_stopped_process_settles_nothing_of_it(
    peers, make_pool, open_transport
):
    pool = make_pool("nixl", 16)
    transport = open_transport("nixl", pool, limits=LIMITS)
    old = peers.start("nixl", epoch="e1", seed=1)
    await transport.connect(old.card, nonce=NONCE)
    old.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        await transport.read(old.worker_id, [1, 2], [1, 2], timeout_s=0.2)
    new = peers.start("nixl", epoch="e2", seed=2)
    await transport.connect(new.card, nonce=NONCE)
    await transport.read(new.worker_id, [3], [3], timeout_s=5)
    new.kill()
    with pytest.raises(PeerGone):
        await transport.read(new.worker_id, [3], [3], timeout_s=5)
    await asyncio.sleep(0.2)
    assert transport.settled() == []
    old.signal(signal.SIGCONT)
    assert await settled_of(transport, 2) == [1, 2]
