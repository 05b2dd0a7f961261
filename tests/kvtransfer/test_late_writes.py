"""Reads that were given up on land late, and never in a block that has been handed out again.

A walk over one reader with a small pool: fetches are cancelled, expire and lose their peer while
their reads are open; the reads land whenever the walk likes. Blocks that come back are handed out
at once and stamped by their new user, who finds every stamp untouched when it is done.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.block import BlockId
from baton.core.kv_layout import KvLayout
from baton.core.request import RequestId
from baton.core.worker_info import Epoch
from fetch_harness import EPOCH, NONCE, PEER, Harness
from kvtransfer.fake_transport import FakeRead
from kvtransfer.messages import ChunkReady, Completed, LeaseId
from kvtransfer.transport import PoolRegion

NUM_BLOCKS = 24
REMOTE_BYTE = 0xEE
NUM_STEPS = 6_000


class Pool:
    """Who uses which block of the reader, and what a user wrote into it."""

    def __init__(self, block_size: int) -> None:
        layout = KvLayout("m", 1, 1, 2, block_size, "float32")
        self.memory = np.zeros((NUM_BLOCKS, layout.block_bytes), dtype=np.uint8)
        self.region = PoolRegion(self.memory.ctypes.data, self.memory.nbytes, NUM_BLOCKS, layout)
        self.free = [BlockId(i) for i in range(NUM_BLOCKS)]
        self.stamps: dict[BlockId, int] = {}
        """Blocks in the hands of users that compute; no read may write there."""
        self.number = 0

    def stamp(self, count: int) -> None:
        for _ in range(min(count, len(self.free))):
            block_id = self.free.pop(0)
            self.number += 1
            self.stamps[block_id] = 1 + self.number % 200
            self.memory[block_id] = self.stamps[block_id]

    def check_stamps(self) -> None:
        for block_id, stamp in self.stamps.items():
            assert (self.memory[block_id] == stamp).all(), f"block {block_id} was written to"

    def unstamp(self, rng: random.Random) -> None:
        for block_id in rng.sample(sorted(self.stamps), len(self.stamps) // 2):
            del self.stamps[block_id]
            self.free.append(block_id)


class Walk:
    def __init__(self, rng: random.Random, owner_block_size: int, reader_block_size: int) -> None:
        self.rng = rng
        self.owner = Pool(owner_block_size)
        self.owner.memory[:] = REMOTE_BYTE
        self.pool = Pool(reader_block_size)
        self.h = Harness(owner_region=self.owner.region, reader_region=self.pool.region)
        self.larger = max(owner_block_size, reader_block_size)
        self.sizes = owner_block_size, reader_block_size
        self.epoch = EPOCH
        self.held: dict[RequestId, list[BlockId]] = {}
        self.number = 0
        self.num_late = 0
        self.num_late_in_use = 0
        self.num_finished = 0

    def begin(self) -> None:
        num_tokens = self.rng.randrange(1, 3) * self.larger
        num_local = num_tokens // self.sizes[1]
        if len(self.pool.free) < num_local:
            return
        self.number += 1
        request_id = RequestId(f"q{self.number}")
        # The oldest free blocks: those that a late read may still have had yesterday.
        local = [self.pool.free.pop(0) for _ in range(num_local)]
        self.held[request_id] = local
        self.h.fetcher.expect(
            request_id, peer=PEER, epoch=self.epoch, timeout_s=self.rng.choice([1.0, 50.0])
        )
        self.h.fetcher.reserved(request_id, local, num_cached_blocks=0)
        num_remote = num_tokens // self.sizes[0]
        message = ChunkReady(
            request_id,
            LeaseId(request_id),
            self.epoch,
            100.0,
            0,
            tuple(BlockId(self.rng.randrange(NUM_BLOCKS)) for _ in range(num_remote)),
            is_last=True,
        )
        self.h.fetcher.receive(PEER, message)

    def land(self, read: FakeRead) -> None:
        if read.is_given_up:
            self.num_late += 1
            in_use = set(read.local_blocks) & {*self.pool.stamps, *self.pool.free}
            in_use |= set(read.local_blocks) & {b for held in self.held.values() for b in held}
            self.num_late_in_use += bool(in_use)
        self.h.transport.finish(read)

    async def restart_owner(self) -> None:
        self.h.fabric.kill(PEER)
        await self.h.settle()
        self.h.fetcher.peer_gone(PEER, self.epoch, "its process has ended")
        self.epoch = Epoch(f"p{self.number + 2}")
        owner = self.h.fabric.transport(PEER, self.epoch, self.owner.region)
        assert await self.h.transport.connect(owner.card(NONCE), nonce=NONCE)

    async def step(self) -> None:
        roll, reads = self.rng.random(), self.h.transport.open_reads
        if roll < 0.30:
            self.begin()
        elif roll < 0.45 and self.held:
            self.h.fetcher.cancel(self.rng.choice(list(self.held)), "walk")
        elif roll < 0.50 and reads:
            self.h.transport.expire(self.rng.choice(reads))
        elif roll < 0.75 and reads:
            self.land(self.rng.choice(reads))
        elif roll < 0.80:
            self.pool.stamp(self.rng.randrange(4))
        elif roll < 0.85:
            self.pool.check_stamps()
            self.pool.unstamp(self.rng)
        elif roll < 0.852:
            await self.restart_owner()
        else:
            self.h.clock.advance(self.rng.random() * 0.3)
            self.h.fetcher.tick()
        await self.h.settle()
        self.collect()

    def collect(self) -> None:
        """Blocks come back as an engine would get them back."""
        recorder = self.h.recorder
        for message in recorder.take_sent():
            lease_id = getattr(message, "lease_id", None)
            if lease_id is not None and lease_id in self.held:
                self.h.fetcher.receive(PEER, Completed(lease_id, self.rng.random() < 0.9))
        for result in recorder.results:
            self.num_finished += 1
            for block_id in self.held[result.request_id]:
                assert (self.pool.memory[block_id] == REMOTE_BYTE).all(), "it did not arrive"
            self.pool.free += self.held.pop(result.request_id)
        for failure in recorder.failures:
            withheld = set(failure.unsettled)
            self.pool.free += [b for b in self.held.pop(failure.request_id) if b not in withheld]
        recorder.results.clear()
        recorder.failures.clear()

    def check(self) -> None:
        self.h.fetcher.check_integrity()
        held = [b for held in self.held.values() for b in held]
        everywhere = [*self.pool.free, *self.pool.stamps, *held, *self.h.recorder.withheld]
        assert sorted(everywhere) == list(range(NUM_BLOCKS)), "a block is lost or used twice"


@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 4)], ids=str)
@pytest.mark.parametrize("seed", [1, 2])
async def test_late_reads_never_write_to_blocks_in_use(seed, sizes):
    walk = Walk(random.Random(seed), *sizes)
    await walk.h.connect()
    settle = walk.h.recorder.blocks_settled

    def settled(block_ids: list[BlockId]) -> None:
        settle(block_ids)
        walk.pool.free = [*block_ids, *walk.pool.free]

    walk.h.recorder.blocks_settled = settled
    for _ in range(NUM_STEPS):
        await walk.step()
        walk.check()
    walk.pool.check_stamps()
    assert walk.num_late_in_use == 0
    # Otherwise the walk has shown nothing.
    assert walk.num_late > 100 and walk.num_finished > 100
    for request_id in list(walk.held):
        walk.h.fetcher.cancel(request_id, "end")
    walk.collect()
    await walk.h.finish()
    assert len(walk.pool.free) + len(walk.pool.stamps) == NUM_BLOCKS
