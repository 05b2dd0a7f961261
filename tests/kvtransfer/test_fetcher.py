"""Fetcher over a fake transport: the whole hand-off, every failure, cancel in every state."""

from __future__ import annotations

import asyncio
import random

import pytest

from baton.core.block import BlockId
from baton.core.errors import (
    IncompatiblePeer,
    LeaseLost,
    PeerGone,
    RequestCancelled,
    TransferError,
    TransferTimeout,
)
from baton.core.kv_layout import KvLayout
from baton.core.request import RequestId
from baton.core.worker_info import Epoch, WorkerId
from fetch_harness import EPOCH, FIRST, LAYOUT, LEASE, NONCE, NUM_BLOCKS, PEER, Harness, R
from kvtransfer.messages import Complete, GiveUp, Refused, Renew, Watch
from kvtransfer.owner import LeaseOwner, OwnerLimits, ReaderId, ReleaseLease, Send
from kvtransfer.transport import PoolRegion


@pytest.fixture
async def h():
    harness = Harness()
    await harness.connect()
    yield harness
    await harness.finish()


async def test_chunks_are_read_validated_and_reported(h):
    h.expect(3)
    assert h.recorder.take_sent() == [Watch(R)]
    h.chunk(0, 2)
    await h.settle()
    assert h.reads == [((100, 101), (0, 1))]
    await h.land()
    h.clock.advance(1.0)
    h.chunk(2, 1, last=True)
    await h.settle()
    assert h.reads == [((102,), (2,))]
    h.clock.advance(0.25)
    await h.land()
    assert h.recorder.take_sent() == [Complete(LEASE, EPOCH)]
    assert not h.recorder.results
    h.clock.advance(0.5)
    h.complete()
    (result,) = h.recorder.results
    assert result.first_token is FIRST
    assert (result.stats.num_blocks, result.stats.num_reads) == (3, 2)
    assert result.stats.num_bytes == 3 * LAYOUT.block_bytes
    assert result.stats.seconds == pytest.approx(0.25)
    assert result.stats.exposed_seconds == pytest.approx(0.25)
    assert (result.started_at_s, result.ended_at_s) == (10.0, 11.75)


async def test_chunks_that_arrive_during_a_read_become_one_read(h):
    h.expect(6)
    h.chunk(0, 1)
    h.chunk(1, 2)
    h.chunk(3, 3, last=True)
    await h.settle()
    assert h.reads == [((100,), (0,))]
    await h.land()
    assert h.reads == [((101, 102, 103, 104, 105), (1, 2, 3, 4, 5))]
    await h.land()
    h.complete()
    assert h.recorder.results[0].stats.num_reads == 2


async def test_cached_blocks_are_not_read(h):
    h.expect(4, cached=3)
    h.chunk(0, 2)
    await h.settle()
    assert h.reads == []
    h.chunk(2, 2, last=True)
    await h.settle()
    assert h.reads == [((103,), (3,))]
    await h.land()
    h.complete()
    assert h.recorder.results[0].stats.num_blocks == 1


async def test_fully_cached_prompt_reads_nothing_but_is_validated(h):
    h.expect(2, cached=2)
    h.chunk(0, 2, last=True)
    assert h.recorder.take_sent() == [Watch(R), Complete(LEASE, EPOCH)]
    h.complete()
    assert h.recorder.results[0].stats.num_reads == 0
    assert h.recorder.results[0].stats.exposed_seconds == 0.0


async def test_lease_is_renewed_while_waiting_and_reading(h):
    h.expect(2)
    h.chunk(0, 1)
    await h.settle()
    h.recorder.take_sent()
    for _ in range(3):
        h.clock.advance(10.0)
        h.fetcher.tick()
    assert h.recorder.take_sent() == [Renew(LEASE)] * 3
    await h.land()
    h.clock.advance(10.0)
    h.fetcher.tick()
    assert h.recorder.take_sent() == [Renew(LEASE)]
    h.fetcher.cancel(R, "test")


async def test_lease_is_renewed_while_our_own_blocks_are_awaited(h):
    h.watch()
    h.chunk(0, 1)
    h.chunk(1, 2, last=True)
    h.recorder.take_sent()
    for _ in range(5):
        h.clock.advance(10.0)
        h.fetcher.tick()
        await h.settle()
    assert h.recorder.take_sent() == [Renew(LEASE)] * 5
    assert not h.reads
    h.reserve(3, cached=1)
    await h.settle()
    assert h.reads == [((101, 102), (1, 2))]
    h.clock.advance(0.25)
    await h.land()
    h.complete()
    (result,) = h.recorder.results
    assert result.first_token is FIRST
    # The wait for blocks is no part of the transfer.
    assert (result.started_at_s, result.ended_at_s) == (60.0, 60.25)
    assert result.stats.exposed_seconds == pytest.approx(0.25)


async def test_lease_is_given_back_when_our_own_blocks_do_not_come(h):
    h.watch(timeout_s=600.0)
    h.chunk(0, 1, last=True)
    for _ in range(12):
        h.clock.advance(10.0)
        h.fetcher.tick()
    assert isinstance(h.failure.error, LeaseLost) and h.failure.unsettled == ()
    assert "no free blocks here for 120 s" in str(h.failure.error)
    assert isinstance(h.recorder.take_sent()[-1], GiveUp)


async def test_wait_for_blocks_ends_at_the_deadline(h):
    h.watch(timeout_s=40.0)
    h.chunk(0, 1, last=True)
    for _ in range(4):
        h.clock.advance(10.0)
        h.fetcher.tick()
    assert isinstance(h.failure.error, TransferTimeout) and h.failure.unsettled == ()
    h.reserve(1)
    await h.settle()
    assert not h.reads and len(h.recorder.failures) == 1


@pytest.mark.parametrize(("num_blocks", "cached"), [(2, 0), (4, 0), (3, 4)])
async def test_reservation_that_does_not_fit_the_announced_prompt_is_refused(h, num_blocks, cached):
    h.watch()
    h.chunk(0, 3, last=True)
    h.reserve(num_blocks, cached=cached)
    assert type(h.failure.error) is TransferError and h.failure.unsettled == ()


async def test_invalid_lease_throws_the_read_away(h):
    h.expect(1)
    h.chunk(0, 1, last=True)
    await h.land()
    h.complete(valid=False)
    assert isinstance(h.failure.error, LeaseLost) and h.failure.unsettled == ()


async def test_lease_that_was_not_renewed_is_not_trusted(h):
    h.expect(2)
    h.chunk(0, 1)
    await h.land()
    h.clock.advance(24.1)
    h.fetcher.tick()
    assert isinstance(h.failure.error, LeaseLost)
    assert "24.1 of its 30 s" in str(h.failure.error)


async def test_refusal_fails_the_fetch_without_an_answer(h):
    h.expect(1)
    h.recorder.take_sent()
    h.fetcher.receive(PEER, Refused(R, "out of memory"))
    assert isinstance(h.failure.error, LeaseLost) and "out of memory" in str(h.failure.error)
    assert h.recorder.take_sent() == []


async def test_refusal_during_a_read_withholds_its_blocks(h):
    h.expect(2)
    h.chunk(0, 2, last=True)
    await h.settle()
    h.fetcher.receive(PEER, Refused(R, "lease expired"))
    assert h.failure.unsettled == (0, 1)


async def test_read_past_its_deadline_withholds_until_it_lands(h):
    h.expect(3)
    h.chunk(0, 2)
    await h.settle()
    (read,) = h.transport.open_reads
    h.transport.expire(read)
    await h.settle()
    assert isinstance(h.failure.error, TransferTimeout)
    assert h.failure.unsettled == (0, 1) and h.fetcher.num_quarantined == 2
    h.fetcher.tick()
    assert h.recorder.withheld == {0, 1}
    h.transport.finish(read)
    h.fetcher.tick()
    assert h.recorder.withheld == set() and h.fetcher.num_quarantined == 0


async def test_dead_peer_fails_the_read_and_nothing_is_withheld(h):
    h.expect(1)
    h.chunk(0, 1, last=True)
    await h.settle()
    h.fabric.kill(PEER)
    await h.settle()
    assert isinstance(h.failure.error, PeerGone) and h.failure.unsettled == ()


async def test_late_write_settles_when_the_peer_dies(h):
    h.expect(1)
    h.chunk(0, 1, last=True)
    await h.settle()
    h.fetcher.cancel(R, "client went away")
    await h.settle()
    assert h.recorder.withheld == {0}
    h.fabric.kill(PEER)
    h.fetcher.tick()
    assert h.recorder.withheld == set()


@pytest.mark.parametrize("state", ["watching", "waiting", "reading", "between", "completing"])
async def test_cancel_in_every_state_is_reported_at_once_and_told_to_the_owner(h, state):
    h.watch()
    if state != "watching":
        h.reserve(3)
    if state != "waiting":
        h.chunk(0, 2)
        await h.settle()
    if state in ("between", "completing"):
        await h.land()
    if state == "completing":
        h.chunk(2, 1, last=True)
        await h.land()
    h.recorder.take_sent()
    h.fetcher.cancel(R, "client went away")
    assert isinstance(h.failure.error, RequestCancelled)
    assert h.failure.unsettled == ((0, 1) if state == "reading" else ())
    assert h.recorder.take_sent() == [GiveUp(R, "client went away")]
    assert h.fetcher.num_fetches == 0
    h.complete()
    h.chunk(2, 1, last=True)
    h.fetcher.cancel(R, "again")
    assert len(h.recorder.failures) == 1


async def test_cancel_in_the_instant_a_read_lands_settles_its_blocks(h):
    h.expect(1)
    h.chunk(0, 1)
    await h.settle()
    h.transport.finish(h.transport.open_reads[0])
    h.fetcher.cancel(R, "client went away")
    assert h.failure.unsettled == (0,)
    await h.settle()
    h.fetcher.tick()
    assert h.recorder.withheld == set()


async def test_cancel_before_the_read_began_withholds_nothing(h):
    h.expect(1)
    h.chunk(0, 1)
    h.fetcher.cancel(R, "client went away")
    assert h.failure.unsettled == ()


async def test_defect_of_a_transport_fails_the_fetch_and_keeps_the_blocks(h, caplog):
    async def broken(*args, **kwargs):
        raise ZeroDivisionError

    h.transport.read = broken
    h.expect(1)
    h.chunk(0, 1)
    await h.settle()
    assert isinstance(h.failure.error, TransferTimeout) and h.failure.unsettled == (0,)
    assert "unexpectedly" in caplog.text
    h.transport._settled.append(BlockId(0))


async def test_prompt_that_never_comes_fails_at_the_deadline(h):
    h.expect(1, timeout_s=5.0)
    h.clock.advance(5.0)
    h.fetcher.tick()
    assert isinstance(h.failure.error, TransferTimeout) and h.failure.unsettled == ()
    assert isinstance(h.recorder.take_sent()[-1], GiveUp)


async def test_owner_that_never_answers_completion_fails_at_the_deadline(h):
    h.expect(1, timeout_s=5.0)
    h.chunk(0, 1, last=True)
    await h.land()
    h.clock.advance(5.0)
    h.fetcher.tick()
    assert isinstance(h.failure.error, TransferTimeout)


async def test_broken_stream_may_come_back_within_its_grace(h):
    h.expect(2)
    h.chunk(0, 1)
    await h.land()
    h.fetcher.link_lost(PEER, EPOCH)
    h.clock.advance(1.9)
    h.fetcher.tick()
    h.recorder.take_sent()
    h.fetcher.link_restored(PEER, EPOCH)
    assert h.recorder.take_sent() == [Watch(R)]
    h.chunk(0, 2, last=True)
    await h.settle()
    assert h.reads == [((101,), (1,))]
    await h.land()
    h.fetcher.link_lost(PEER, EPOCH)
    h.recorder.take_sent()
    h.fetcher.link_restored(PEER, EPOCH)
    assert h.recorder.take_sent() == [Complete(LEASE, EPOCH)]
    h.complete()
    assert len(h.recorder.results) == 1


async def test_stream_that_stays_away_is_a_dead_peer(h):
    h.expect(1)
    h.fetcher.link_lost(PEER, EPOCH)
    h.clock.advance(2.0)
    h.recorder.take_sent()
    h.fetcher.tick()
    assert isinstance(h.failure.error, PeerGone)
    # Told when the stream is there again after all: the owner's lease would run on.
    assert h.recorder.take_sent() == [GiveUp(R, str(h.failure.error))]


@pytest.mark.parametrize("lands", [True, False])
async def test_read_of_a_peer_that_is_gone_does_not_wait_for_its_word(h, lands):
    """Memory can still be read when the process behind it, or the way to it, is no more."""
    h.expect(1)
    h.chunk(0, 1, last=True)
    await h.settle()
    h.fetcher.peer_gone(PEER, EPOCH, "its stream was closed")
    if lands:
        await h.land()
    h.clock.advance(2.0)
    h.fetcher.tick()
    await h.settle()
    assert isinstance(h.failure.error, PeerGone)
    assert h.failure.unsettled == (() if lands else (BlockId(0),))
    for read in list(h.transport.open_reads):
        h.transport.finish(read)
    h.fetcher.tick()
    assert h.fetcher.is_empty


async def test_restarted_peer_fails_its_fetches(h):
    h.expect(1)
    h.fetcher.link_lost(PEER, EPOCH)
    h.fetcher.link_restored(PEER, Epoch("p2"))
    assert isinstance(h.failure.error, PeerGone) and "restarted" in str(h.failure.error)


async def test_late_end_of_an_older_epoch_leaves_the_newer_alone(h):
    h.expect(1)
    h.fetcher.link_lost(PEER, Epoch("p0"))
    h.fetcher.peer_gone(PEER, Epoch("p0"), "its stream was closed")
    h.clock.advance(5.0)
    h.fetcher.tick()
    assert h.fetcher.num_fetches == 1
    h.fetcher.peer_gone(PEER, EPOCH, "its stream was closed")
    assert isinstance(h.failure.error, PeerGone)


async def test_chunk_of_another_epoch_is_refused(h):
    h.expect(1)
    h.chunk(0, 1, last=True, epoch=Epoch("p2"))
    assert isinstance(h.failure.error, LeaseLost)


@pytest.mark.parametrize(("first", "count", "last"), [(1, 1, False), (0, 5, False), (0, 3, True)])
async def test_chunks_that_do_not_fit_the_reservation_are_refused(h, first, count, last):
    h.expect(4)
    h.chunk(first, count, last=last)
    assert type(h.failure.error) is TransferError


async def test_messages_of_another_peer_are_ignored(h):
    h.expect(1)
    h.fetcher.receive(WorkerId("prefill-9"), Refused(R, "not yours"))
    assert h.fetcher.num_fetches == 1
    h.fetcher.cancel(R, "test")


async def test_request_cannot_be_fetched_twice_at_once(h):
    h.expect(1)
    with pytest.raises(ValueError, match="already"):
        h.expect(1)
    h.fetcher.cancel(R, "test")


async def test_close_fails_what_is_open(h):
    h.expect(2)
    h.chunk(0, 1)
    await h.settle()
    await h.fetcher.close()
    assert isinstance(h.failure.error, RequestCancelled) and h.failure.unsettled == (0,)


async def test_fake_card_is_checked_like_a_real_one(h):
    other = PoolRegion(0, 1 << 20, 8, KvLayout("m", 2, 1, 8, 4, "float32"))
    stranger = h.fabric.transport("prefill-1", "p1", other)
    with pytest.raises(IncompatiblePeer, match="num_layers: 1 here, 2 there"):
        await h.transport.connect(stranger.card(NONCE), nonce=NONCE)


class World:
    """A real owner and a real fetcher, joined by queues that a walk can cut and delay."""

    def __init__(self, rng: random.Random) -> None:
        self.h = Harness()
        self.rng = rng
        limits = OwnerLimits(lease_s=6.0, watch_s=20.0, ended_s=30.0)
        self.owner = LeaseOwner(epoch=EPOCH, clock=self.h.clock, limits=limits)
        self.to_reader: list[object] = []
        self.leased: set[RequestId] = set()
        self.reserved: dict[RequestId, set[BlockId]] = {}
        self.computed: dict[RequestId, int] = {}
        self.free = set(map(BlockId, range(NUM_BLOCKS)))
        self.waiting: list[tuple[RequestId, list[BlockId]]] = []
        """Expected, but not told yet which blocks to read into."""
        self.number = 0
        self.is_linked = True

    def apply(self, effects) -> None:
        for effect in effects:
            match effect:
                case ReleaseLease(request_id):
                    self.leased.discard(request_id)
                case Send(_, message) if self.is_linked:
                    self.to_reader.append(message)

    def pump(self) -> None:
        recorder = self.h.recorder
        for message in recorder.take_sent():
            if self.is_linked:
                self.apply(self.owner.receive(ReaderId("decode-0"), message))
        while self.to_reader and self.rng.random() < 0.7:
            self.h.fetcher.receive(PEER, self.to_reader.pop(0))
        for result in recorder.results:
            self.free |= self.reserved.pop(result.request_id)
        for failure in recorder.failures:
            self.free |= self.reserved.pop(failure.request_id) - set(failure.unsettled)
        recorder.results.clear()
        recorder.failures.clear()

    def submit(self) -> None:
        count = self.rng.randrange(1, 7)
        if len(self.free) < count or len(self.reserved) > 12:
            return
        self.number += 1
        request_id = RequestId(f"q{self.number}")
        local = [self.free.pop() for _ in range(count)]
        self.reserved[request_id] = set(local)
        self.computed[request_id] = 0
        self.h.fetcher.expect(
            request_id,
            peer=PEER,
            epoch=EPOCH,
            timeout_s=self.rng.choice([3.0, 60.0]),
        )
        self.waiting.append((request_id, local))

    def reserve(self) -> None:
        request_id, local = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        num_cached_blocks = self.rng.randrange(0, len(local) + 1)
        self.h.fetcher.reserved(request_id, local, num_cached_blocks=num_cached_blocks)

    def compute(self) -> None:
        request_id = self.rng.choice(list(self.computed))
        total = self.sizes(request_id)
        done = self.computed[request_id]
        count = self.rng.randrange(0, total - done + 1)
        is_last = done + count == total
        self.leased.add(request_id)
        self.computed[request_id] += count
        if is_last:
            del self.computed[request_id]
        blocks = [BlockId(self.rng.randrange(NUM_BLOCKS)) for _ in range(count)]
        self.apply(
            self.owner.chunk_done(
                request_id,
                first_block_index=done,
                block_ids=blocks,
                is_last=is_last,
                first_token=FIRST if is_last else None,
            )
        )

    def sizes(self, request_id: RequestId) -> int:
        known = self.reserved.get(request_id)
        return max(len(known), 1) if known else self.computed[request_id] + 1

    async def step(self) -> None:
        roll, reads = self.rng.random(), self.h.transport.open_reads
        if roll < 0.15:
            self.submit()
        elif roll < 0.45 and self.computed:
            self.compute()
        elif roll < 0.65 and reads:
            self.h.transport.finish(self.rng.choice(reads))
        elif roll < 0.66 and reads:
            self.h.transport.expire(self.rng.choice(reads))
        elif roll < 0.675 and self.reserved:
            self.h.fetcher.cancel(self.rng.choice(list(self.reserved)), "walk")
        elif roll < 0.685 and self.computed:
            request_id = self.rng.choice(list(self.computed))
            del self.computed[request_id]
            self.apply(self.owner.request_failed(request_id, "walk"))
        elif roll < (0.688 if self.is_linked else 0.8):
            self.cut_or_restore()
        else:
            self.h.clock.advance(self.rng.random() * 0.4)
            self.apply(self.owner.tick())
            self.h.fetcher.tick()
        if self.waiting and self.rng.random() < 0.6:
            self.reserve()
        self.pump()
        await asyncio.sleep(0)

    def cut_or_restore(self) -> None:
        if self.is_linked:
            self.to_reader.clear()
            self.apply(self.owner.reader_gone(ReaderId("decode-0")))
            self.is_linked = False
            self.h.fetcher.link_lost(PEER, EPOCH)
        else:
            self.is_linked = True
            self.h.fetcher.link_restored(PEER, EPOCH)

    def check(self) -> None:
        self.h.fetcher.check_integrity()
        self.owner.check_integrity()
        assert len(self.leased) == self.owner.num_leases
        held = set().union(self.h.recorder.withheld, *self.reserved.values())
        assert not held & self.free


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_walk_of_owner_and_reader_leaks_nothing(seed):
    world = World(random.Random(seed))
    await world.h.connect()
    settled_early = world.h.recorder.blocks_settled

    def settle(blocks):
        settled_early(blocks)
        world.free.update(blocks)

    world.h.recorder.blocks_settled = settle
    num_results = 0
    finished = world.h.recorder.transfer_finished

    def count(result):
        nonlocal num_results
        num_results += 1
        finished(result)

    world.h.recorder.transfer_finished = count
    for _ in range(10_000):
        await world.step()
        world.check()
    assert num_results > 150
    for request_id in list(world.reserved):
        world.h.fetcher.cancel(request_id, "end")
    await world.h.finish()
    world.pump()
    world.h.clock.advance(100)
    world.apply(world.owner.tick())
    assert not world.leased and world.owner.is_empty and not world.reserved
    assert len(world.free) == NUM_BLOCKS
