"""Mover over a link that obeys the test: pieces, deadlines, quarantine, recycle."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest

from baton.core.block import BlockId
from baton.core.clock import ManualClock
from baton.core.errors import ConfigError, PeerGone, TransferError, TransferTimeout
from baton.core.worker_info import WorkerId
from kvtransfer.block_read import BlockRead, MoverLimits
from kvtransfer.link import ConnectionLost, LinkBroken
from kvtransfer.mover import Mover
from kvtransfer.pace import DUE_LEAD_S, MAX_DUE_POLL_S, MAX_POLL_S, MAX_SPIN_S
from kvtransfer.plan import PairPlan, SidePlan, checked_ids

PEER = WorkerId("prefill-0")
OTHER = WorkerId("prefill-1")
CANCELLABLE = WorkerId("prefill-2")
"""Served by a link that can cancel what it moves."""
HALVES = WorkerId("prefill-3")
"""Has blocks of half our size: two units to each block of ours."""
BLOCK_BYTES = 10


def side(num_blocks: int, *parts: int) -> SidePlan:
    offsets = np.array(parts, dtype=np.int64)[:, None]
    return SidePlan(num_blocks, BLOCK_BYTES, offsets, BLOCK_BYTES // len(parts))


WHOLE = PairPlan(side(100, 0), side(100, 0))
SPLIT = PairPlan(SidePlan(200, 5, np.array([[0]], dtype=np.int64), 5), side(100, 0, 5))


class SlowPiece:
    """In flight until the link says otherwise."""

    def __init__(self, link: SlowLink, peer: WorkerId, local: list[int]) -> None:
        self.link, self.peer, self.local = link, peer, local
        self.life = (peer, link.lives[peer])
        self.has_landed = False
        self.is_cancelled = False
        self.is_released = False

    def is_done(self) -> bool:
        if self.link.defect is not None:
            raise self.link.defect
        if self.life in self.link.dead:
            raise PeerGone(f"{self.peer} died")
        if self.life in self.link.lost:
            raise ConnectionLost(f"connection to {self.peer} lost")
        if self.peer in self.link.broken:
            raise LinkBroken("no route")
        return self.has_landed

    def cancel(self) -> bool:
        self.is_cancelled = self.peer == CANCELLABLE
        return self.is_cancelled

    def release(self) -> None:
        self.is_released = True

    def may_write(self) -> bool:
        is_over = self.has_landed or self.is_cancelled
        return not is_over and self.life not in self.link.dead | self.link.lost


class SlowLink:
    """Pieces land when told to. A peer that is dropped is another process afterwards."""

    def __init__(self) -> None:
        self.pieces: list[SlowPiece] = []
        self.lives: Counter[WorkerId] = Counter()
        self.dead: set[tuple[WorkerId, int]] = set()
        self.lost: set[tuple[WorkerId, int]] = set()
        self.broken: set[WorkerId] = set()
        self.immediate = False
        self.posted: list[list[int]] = []
        self.threads: set[str] = set()
        self.num_recycles = 0
        self.dropped: list[WorkerId] = []
        self.is_closed = False
        self.recycle_error: Exception | None = None
        self.defect: Exception | None = None
        """Raised by whatever is asked of the link."""

    def open(self) -> None:
        self.threads.add(threading.current_thread().name)

    def kill(self, peer: WorkerId) -> None:
        self.dead.add((peer, self.lives[peer]))

    def lose_connection(self, peer: WorkerId) -> None:
        self.lost.add((peer, self.lives[peer]))

    def post(self, peer, remote, local, *, by_layer=False):
        self.threads.add(threading.current_thread().name)
        if self.defect is not None:
            raise self.defect
        if (peer, self.lives[peer]) in self.dead:
            raise PeerGone(f"{peer} died")
        if (peer, self.lives[peer]) in self.lost:
            self.lives[peer] += 1
        self.posted.append(local.tolist())
        if self.immediate:
            return None
        piece = SlowPiece(self, peer, local.tolist())
        self.pieces.append(piece)
        return piece

    def drop_peer(self, peer: WorkerId) -> None:
        self.dropped.append(peer)
        self.lives[peer] += 1

    def needs_recycle(self, peer: WorkerId) -> bool:
        return peer != CANCELLABLE

    def recycle(self) -> None:
        if self.recycle_error is not None:
            raise self.recycle_error
        pieces = [p for p in self.pieces if p.peer != CANCELLABLE]
        assert all(p.is_released for p in pieces)
        for piece in pieces:
            piece.is_cancelled = True
        self.num_recycles += 1
        self.broken.clear()

    def close(self) -> None:
        self.is_closed = True

    def land_all(self) -> None:
        for piece in self.pieces:
            piece.has_landed = True


LIMITS = {
    "max_bytes_in_flight": 80,
    "max_piece_bytes": 20,
    "max_quarantined_ratio": 1.0,
    "recycle_pause_s": 0.0,
}


class Harness:
    def __init__(self, **limits: float) -> None:
        self.link = SlowLink()
        self.mover = Mover(
            self.link,
            pool_bytes=100 * BLOCK_BYTES,
            limits=MoverLimits(**{**LIMITS, **limits}),
            name="mover-under-test",
        )
        self.mover.start(timeout_s=5)
        self.settled: list[BlockId] = []

    def read(
        self,
        blocks: range,
        *,
        peer: WorkerId = PEER,
        plan: PairPlan = WHOLE,
        timeout_s: float = 5.0,
    ) -> BlockRead:
        ids = checked_ids(list(blocks), 100, "the")
        read = BlockRead(peer, plan, ids, ids, time.monotonic() + timeout_s)
        self.mover.read(read)
        return read

    def until(self, claim) -> None:
        deadline_s = time.monotonic() + 5
        while not claim():
            assert time.monotonic() < deadline_s, "waited too long"
            time.sleep(0.001)

    def until_settled(self, blocks: range) -> None:
        def claim() -> bool:
            self.settled += self.mover.settled()
            return len(self.settled) >= len(blocks)

        self.until(claim)
        assert sorted(self.settled) == list(blocks)

    def failure(self, future: Future) -> BaseException:
        error = future.exception(5)
        assert error is not None
        return error


@pytest.fixture
def make():
    made: list[Harness] = []

    def start(**limits: float) -> Harness:
        made.append(Harness(**limits))
        return made[-1]

    yield start
    for h in made:
        h.mover.stop(timeout_s=5)
        assert h.link.is_closed
        assert all(p.is_released for p in h.link.pieces)
        assert h.link.threads == {"mover-under-test"}


def test_read_is_cut_into_pieces_and_bounded_in_flight(make):
    h = make()
    read = h.read(range(15))
    h.until(lambda: len(h.link.posted) == 4)
    time.sleep(0.02)
    assert h.link.posted == [[0, 1], [2, 3], [4, 5], [6, 7]]
    h.link.pieces[0].has_landed = True
    h.until(lambda: len(h.link.posted) == 5)
    h.until(lambda: h.link.land_all() or read.future.done())
    stats = read.future.result(1)
    assert stats.num_bytes == 150 and len(h.link.posted) == 8


def test_short_pieces_are_looked_at_soon_and_long_ones_rarely():
    """Without the thread: how long it would sleep between two looks."""
    clock, link = ManualClock(), SlowLink()
    limits = MoverLimits(**LIMITS, min_poll_s=1e-5)
    mover = Mover(link, pool_bytes=1000, limits=limits, name="never started", clock=clock)
    ids = checked_ids([1], 100, "the")
    mover.read(BlockRead(PEER, WHOLE, ids, ids, deadline_s=clock.now() + 10))
    mover.step()
    sleeps = [mover.poll_s()]
    for seconds in (0.0004, 0.0008, 0.0088):
        clock.advance(seconds)
        sleeps.append(mover.poll_s())
    assert sleeps == pytest.approx([1e-5, 2e-5, 6e-5, MAX_POLL_S])


def test_a_piece_is_awaited_asleep_until_it_is_about_due_and_without_a_pause_then(monkeypatch):
    """By the rate of the pieces before; a late one is looked for at the usual pace again."""
    monkeypatch.setattr("kvtransfer.pace.RATED_PIECE_BYTES", 1)
    clock, link = ManualClock(), SlowLink()
    mover = Mover(
        link, pool_bytes=100 * BLOCK_BYTES, limits=MoverLimits(**LIMITS), name="m", clock=clock
    )

    def post():
        ids = checked_ids([1, 2], 100, "the")
        mover.read(BlockRead(PEER, WHOLE, ids, ids, clock.now() + 5))
        mover.step()

    post()
    clock.advance(0.004)
    link.land_all()
    mover.step()
    clock.advance(1.0)
    post()
    waits = []
    while (wait_s := mover.poll_s()) > 0:
        waits.append(wait_s)
        clock.advance(wait_s)
    # Of 4 ms, in halves while there is much left; an early end is seen by the next look.
    assert sum(waits) == pytest.approx(0.004 - DUE_LEAD_S)
    assert len(waits) < 10 and max(waits) == waits[0] == MAX_DUE_POLL_S
    spun_s = 0.0
    while mover.poll_s() == 0.0:
        clock.advance(0.00001)
        spun_s += 0.00001
    assert spun_s == pytest.approx(DUE_LEAD_S + MAX_SPIN_S, abs=0.00002)
    assert mover.poll_s() == MAX_POLL_S
    clock.advance(3.0)
    link.land_all()
    mover.step()
    post()
    # After a link that stood still the next piece is not waited for as long.
    assert mover.poll_s() == MAX_DUE_POLL_S
    link.land_all()
    mover.step()


def test_reads_take_turns(make):
    h = make(max_bytes_in_flight=20)
    h.read(range(0, 4))
    h.read(range(10, 14), peer=OTHER)
    h.until(lambda: h.link.land_all() or len(h.link.posted) == 4)
    assert h.link.posted == [[0, 1], [10, 11], [2, 3], [12, 13]]
    h.until(lambda: all(p.is_released for p in h.link.pieces) or h.link.land_all())


def test_deadline_gives_up_and_late_landing_settles(make):
    h = make()
    read = h.read(range(12), timeout_s=0.05)
    assert isinstance(h.failure(read.future), TransferTimeout)
    # Four pieces are in flight, the other four blocks were never posted.
    h.until(lambda: h.settled.extend(h.mover.settled()) or len(h.settled) == 4)
    assert sorted(h.settled) == [8, 9, 10, 11]
    time.sleep(0.03)
    assert h.mover.settled() == []
    h.link.land_all()
    h.until_settled(range(12))
    assert h.mover.counters.recycles == 0


def test_given_up_read_settles_every_block_once_in_any_state(make):
    h = make()
    running = h.read(range(6))
    h.until(lambda: len(h.link.posted) == 3)
    h.mover.give_up(running)
    assert isinstance(h.failure(running.future), TransferTimeout)
    h.mover.give_up(running)
    h.link.land_all()
    h.until_settled(range(6))
    h.link.immediate = True
    done = h.read(range(6))
    assert done.future.result(5).num_bytes == 60
    h.settled.clear()
    h.mover.give_up(done)
    h.until_settled(range(6))


def test_dead_peer_fails_its_reads_only_and_settles_its_quarantine(make):
    h = make()
    late = h.read(range(0, 2), timeout_s=0.02)
    assert isinstance(h.failure(late.future), TransferTimeout)
    dying, healthy = h.read(range(2, 4)), h.read(range(4, 6), peer=OTHER)
    h.until(lambda: len(h.link.posted) == 3)
    h.link.kill(PEER)
    assert isinstance(h.failure(dying.future), PeerGone)
    h.until_settled(range(0, 2))
    assert h.link.dropped == [PEER]
    h.link.land_all()
    assert healthy.future.result(5).num_bytes == 20


def test_lost_connection_ends_reads_but_not_the_peer(make):
    h = make()
    read, healthy = h.read(range(0, 2)), h.read(range(4, 6), peer=OTHER)
    h.until(lambda: len(h.link.posted) == 2)
    h.link.lose_connection(PEER)
    error = h.failure(read.future)
    assert isinstance(error, PeerGone) and not isinstance(error, ConnectionLost)
    assert h.link.dropped == [] and h.mover.settled() == []
    again = h.read(range(0, 2))
    h.until(lambda: len(h.link.posted) == 3)
    h.link.land_all()
    assert again.future.result(5).num_bytes == healthy.future.result(5).num_bytes == 20


def test_quarantine_outlives_the_successor_of_its_peer(make):
    """The stopped process may wake after the one that took its name has died."""
    h = make()
    h.failure(h.read(range(0, 2), timeout_s=0.02).future)
    h.mover.call(lambda: h.mover.leave_peer(PEER, "replaced")).result(5)
    successor = h.read(range(2, 4))
    h.until(lambda: len(h.link.posted) == 2)
    h.link.kill(PEER)
    assert isinstance(h.failure(successor.future), PeerGone)
    time.sleep(0.03)
    assert h.mover.settled() == [], "the first process lives"
    h.link.land_all()
    h.until_settled(range(2))


def test_what_can_be_cancelled_is_settled_at_once(make):
    h = make()
    late = h.read(range(0, 6), peer=CANCELLABLE, timeout_s=0.02)
    assert isinstance(h.failure(late.future), TransferTimeout)
    h.until_settled(range(6))
    left = h.read(range(6, 8), peer=CANCELLABLE)
    h.until(lambda: len(h.link.posted) == 4)
    h.mover.call(lambda: h.mover.leave_peer(CANCELLABLE, "replaced")).result(5)
    assert isinstance(h.failure(left.future), PeerGone), "nothing of it can land"


def test_block_is_settled_with_the_last_of_its_units(make):
    h = make(max_piece_bytes=15, max_bytes_in_flight=30)
    late = h.read(range(0, 8), peer=HALVES, plan=SPLIT, timeout_s=0.05)
    h.until(lambda: h.link.posted == [[0, 1, 2], [3, 4, 5]])
    assert isinstance(h.failure(late.future), TransferTimeout)
    h.until(lambda: h.settled.extend(h.mover.settled()) or h.settled == [3])
    h.link.pieces[0].has_landed = True
    h.until(lambda: h.settled.extend(h.mover.settled()) or h.settled == [3, 0])
    h.link.pieces[1].has_landed = True
    h.until_settled(range(4))


def test_scratch_is_never_reported(make):
    h = make()
    ids = checked_ids([98, 99], 100, "the")
    read = BlockRead(PEER, WHOLE, ids, ids, time.monotonic() + 0.02, is_scratch=True)
    h.mover.read(read)
    h.failure(read.future)
    h.link.land_all()
    h.until(lambda: all(p.is_released for p in h.link.pieces))
    assert h.mover.settled() == []


def test_recycle_spares_links_that_need_none(make):
    h = make()
    h.failure(h.read(range(0, 2), timeout_s=0.02).future)
    healthy = h.read(range(2, 4), peer=CANCELLABLE)
    h.until(lambda: len(h.link.posted) == 2)
    assert h.mover.recycle().result(5) is None
    assert not healthy.future.done()
    h.link.land_all()
    assert healthy.future.result(5).num_bytes == 20
    h.until_settled(range(2))


def test_counters_tell_done_from_failed(make):
    h = make()
    h.link.immediate = True
    h.read(range(4)).future.result(5)
    h.link.immediate = False
    h.failure(h.read(range(2), timeout_s=0.02).future)
    mine = h.read(range(2, 4))
    h.mover.give_up(mine)
    h.failure(mine.future)
    h.link.land_all()
    counters = h.mover.counters
    assert (counters.reads, counters.read_bytes, counters.failed_reads) == (1, 40, 1)


@pytest.mark.parametrize("is_posted", [False, True])
def test_defect_of_a_link_ends_its_reads_and_not_the_thread(make, caplog, is_posted):
    h = make(recycle_pause_s=0.2)
    if is_posted:
        read = h.read(range(4))
        h.until(lambda: len(h.link.posted) == 2)
        h.link.defect = TypeError("a defect")
    else:
        h.link.defect = TypeError("a defect")
        read = h.read(range(4))
    error = h.failure(read.future)
    assert isinstance(error, TransferTimeout), "what it has begun may still land"
    assert "TypeError: a defect" in str(error) and "Traceback" in caplog.text
    h.link.defect = None
    h.until_settled(range(4))
    h.link.immediate = True
    assert h.read(range(6), peer=OTHER).future.result(5).num_bytes == 60


def test_broken_link_to_a_living_peer_quarantines_and_recycles(make):
    h = make()
    read, healthy = h.read(range(0, 2)), h.read(range(4, 6), peer=OTHER)
    h.until(lambda: len(h.link.posted) == 2)
    h.link.broken.add(PEER)
    assert isinstance(h.failure(read.future), TransferTimeout)
    time.sleep(0.02)
    assert h.link.num_recycles == 0, "healthy pieces land first"
    h.link.land_all()
    assert healthy.future.result(5).num_bytes == 20
    h.until_settled(range(0, 2))
    assert h.link.num_recycles == 1


def test_too_many_quarantined_blocks_recycle_the_link(make):
    h = make(max_quarantined_ratio=0.03)
    first = h.read(range(0, 2), timeout_s=0.02)
    h.failure(first.future)
    time.sleep(0.03)
    assert h.link.num_recycles == 0
    h.failure(h.read(range(2, 4), timeout_s=0.02).future)
    h.until_settled(range(4))
    assert h.link.num_recycles == 1


def test_old_quarantine_recycles_the_link(make):
    h = make(max_quarantine_s=0.1)
    started_s = time.monotonic()
    h.failure(h.read(range(0, 2), timeout_s=0.02).future)
    h.until_settled(range(2))
    assert time.monotonic() - started_s >= 0.1


def test_failed_recycle_settles_nothing(make):
    h = make()
    h.failure(h.read(range(0, 2), timeout_s=0.02).future)
    h.link.recycle_error = LinkBroken("still referenced")
    assert isinstance(h.failure(h.mover.recycle()), LinkBroken)
    assert h.mover.settled() == []
    h.link.recycle_error = None
    assert h.mover.recycle().result(5) is None
    h.until_settled(range(2))


def test_peer_left_while_alive_quarantines_what_is_in_flight(make):
    h = make(max_bytes_in_flight=20)
    flying, queued = h.read(range(0, 2)), h.read(range(2, 4))
    h.until(lambda: len(h.link.posted) == 1)
    h.mover.call(lambda: h.mover.leave_peer(PEER, "replaced")).result(5)
    assert isinstance(h.failure(flying.future), TransferTimeout)
    assert isinstance(h.failure(queued.future), PeerGone)
    h.link.land_all()
    h.until_settled(range(2))


def test_stopping_fails_open_reads_and_settles_them(make):
    h = make()
    read = h.read(range(20))
    h.until(lambda: len(h.link.posted) == 4)
    h.mover.stop(timeout_s=5)
    assert isinstance(h.failure(read.future), TransferError)
    h.until_settled(range(20))


def test_link_that_cannot_be_opened_leaves_no_thread():
    link = SlowLink()

    def fail() -> None:
        raise TransferError("no agent here")

    link.open = fail
    mover = Mover(link, pool_bytes=1, limits=MoverLimits(), name="unopened")
    with pytest.raises(TransferError, match="no agent here"):
        mover.start(timeout_s=5)
    mover.stop(timeout_s=5)
    assert link.is_closed


def test_idle_mover_sleeps(make):
    h = make()
    h.link.immediate = True
    h.read(range(4)).future.result(5)
    before_s = time.thread_time_ns(), time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before_s[1] < 0.03


def test_errors_of_calls_reach_the_caller(make):
    def fail() -> None:
        raise PeerGone("nobody")

    assert isinstance(h_error := make().mover.call(fail).exception(5), PeerGone)
    assert h_error.__traceback__ is None or h_error.__traceback__.tb_next is None


class Walk:
    """A mover without a thread, a clock that is moved by hand, and the account of its blocks."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.clock = ManualClock()
        self.link = SlowLink()
        limits = MoverLimits(
            max_bytes_in_flight=80,
            max_piece_bytes=20,
            max_quarantined_ratio=0.2,
            max_quarantine_s=20.0,
            recycle_pause_s=1.0,
        )
        self.mover = Mover(
            self.link,
            pool_bytes=100 * BLOCK_BYTES,
            limits=limits,
            name="not started",
            clock=self.clock,
        )
        self.free = set(range(100))
        self.open: list[BlockRead] = []
        self.withheld: set[int] = set()
        self.outcomes: Counter[str] = Counter()

    def writable(self) -> set[int]:
        """Blocks that something in flight may still write to."""
        return {
            block
            for piece in self.link.pieces
            if piece.may_write()
            for block in np.array(piece.local) // (2 if piece.peer == HALVES else 1)
        }

    def act(self) -> None:
        roll, link = self.rng.random(), self.link
        peer = self.rng.choice([PEER, OTHER, CANCELLABLE, HALVES])
        if roll < 0.25 and len(self.free) > 8:
            blocks = self.rng.sample(sorted(self.free), self.rng.randrange(1, 8))
            self.free -= set(blocks)
            units = [2 * b + i for b in blocks for i in (0, 1)] if peer == HALVES else blocks
            plan = SPLIT if peer == HALVES else WHOLE
            ids = checked_ids(units, plan.local.num_units, "the")
            deadline_s = self.clock.now() + self.rng.choice([1.0, 9.0])
            read = BlockRead(peer, plan, ids, ids, deadline_s)
            self.open.append(read)
            self.mover.read(read)
        elif roll < 0.55 and link.pieces:
            self.rng.choice(link.pieces).has_landed = True
        elif roll < 0.60 and self.open:
            self.cancel(self.rng.choice(self.open))
        elif roll < 0.603:
            link.kill(peer)
        elif roll < 0.606:
            link.lose_connection(peer)
        elif roll < 0.623:
            link.broken.add(peer)
        elif roll < 0.63:
            is_stuck = self.rng.random() < 0.2
            link.recycle_error = LinkBroken("still referenced") if is_stuck else None
        elif roll < 0.635:
            self.mover.recycle()
        elif roll < 0.638:
            self.mover.leave_peer(peer, "replaced")
        else:
            self.clock.advance(self.rng.random() * 0.2)

    def cancel(self, read: BlockRead) -> None:
        """What the transport does when its caller is cancelled: maybe after the read's end."""
        self.open.remove(read)
        self.withheld |= read.blocks_of(read.local)
        self.outcomes["cancelled"] += 1
        self.mover.give_up(read)

    def account(self) -> None:
        for read in [r for r in self.open if r.future.done() and self.rng.random() < 0.9]:
            self.open.remove(read)
            blocks = read.blocks_of(read.local)
            error = read.future.exception()
            self.outcomes[type(error).__name__] += 1
            if isinstance(error, TransferTimeout):
                self.withheld |= blocks
                continue
            assert not blocks & self.writable(), "ended while a piece may still land"
            self.free |= blocks
        undecided = {b for r in self.open if r.future.done() for b in r.blocks_of(r.local)}
        for block in self.mover.settled():
            assert block not in self.writable(), "settled while a piece may still land"
            self.early.append(block) if block in undecided else self.settle(block)
        for block in [b for b in self.early if b in self.withheld]:
            self.early.remove(block)
            self.settle(block)
        # Nothing refers to a landed or cancelled piece any more.
        self.link.pieces = [p for p in self.link.pieces if not p.is_released]

    early: list[int]

    def settle(self, block: int) -> None:
        self.withheld.remove(block)
        self.free.add(block)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_walk_settles_every_block_once_and_never_too_early(seed):
    walk = Walk(random.Random(seed))
    walk.early = []
    for _ in range(10_000):
        walk.act()
        walk.mover.step()
        walk.mover.check_integrity()
        walk.account()
    assert {"NoneType", "TransferTimeout", "PeerGone", "cancelled"} <= walk.outcomes.keys()
    assert walk.outcomes["NoneType"] > 300 and walk.mover.counters.recycles > 10
    walk.link.recycle_error = None
    for _ in range(300):
        walk.clock.advance(1.0)
        walk.mover.step()
        walk.account()
    assert not walk.withheld and not walk.open and not walk.early
    assert walk.free == set(range(100))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_piece_bytes": 0},
        {"max_piece_bytes": 2, "max_bytes_in_flight": 1},
        {"max_quarantined_ratio": 1.5},
        {"max_quarantine_s": -1},
    ],
)
def test_contradicting_limits_are_refused(limits):
    with pytest.raises(ConfigError):
        MoverLimits(**limits)
