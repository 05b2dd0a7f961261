"""Mover over a link that obeys the test: pieces, deadlines, quarantine, recycle."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future

import pytest

from baton.core.block import BlockId
from baton.core.clock import ManualClock
from baton.core.errors import ConfigError, PeerGone, TransferError, TransferTimeout
from baton.core.worker_info import WorkerId
from kvtransfer.link import LinkBroken
from kvtransfer.mover import BlockRead, Mover, MoverLimits
from kvtransfer.plan import checked_ids

PEER = WorkerId("prefill-0")
OTHER = WorkerId("prefill-1")
BLOCK_BYTES = 10


class SlowPiece:
    """In flight until the link says otherwise."""

    def __init__(self, link: SlowLink, peer: WorkerId, local: list[int]) -> None:
        self.link, self.peer, self.local = link, peer, local
        self.has_landed = False
        self.is_cancelled = False
        self.is_released = False

    def is_done(self) -> bool:
        if self.peer in self.link.dead:
            raise PeerGone(f"{self.peer} died")
        if self.peer in self.link.broken:
            raise LinkBroken("no route")
        return self.has_landed

    def release(self) -> None:
        self.is_released = True


class SlowLink:
    """Pieces land when told to. `written` is what a late write would corrupt."""

    def __init__(self) -> None:
        self.pieces: list[SlowPiece] = []
        self.dead: set[WorkerId] = set()
        self.broken: set[WorkerId] = set()
        self.immediate = False
        self.posted: list[list[int]] = []
        self.threads: set[str] = set()
        self.num_recycles = 0
        self.dropped: list[WorkerId] = []
        self.is_closed = False
        self.recycle_error: Exception | None = None

    def open(self) -> None:
        self.threads.add(threading.current_thread().name)

    def post(self, peer, remote, local):
        self.threads.add(threading.current_thread().name)
        if peer in self.dead:
            raise PeerGone(f"{peer} died")
        self.posted.append(local.tolist())
        if self.immediate:
            return None
        piece = SlowPiece(self, peer, local.tolist())
        self.pieces.append(piece)
        return piece

    def drop_peer(self, peer: WorkerId) -> None:
        self.dropped.append(peer)

    def recycle(self) -> None:
        if self.recycle_error is not None:
            raise self.recycle_error
        assert all(p.is_released for p in self.pieces)
        for piece in self.pieces:
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
            block_bytes=BLOCK_BYTES,
            num_blocks=100,
            limits=MoverLimits(**{**LIMITS, **limits}),
            name="mover-under-test",
        )
        self.mover.start(timeout_s=5)
        self.settled: list[BlockId] = []

    def read(self, blocks: range, *, peer: WorkerId = PEER, timeout_s: float = 5.0) -> BlockRead:
        ids = checked_ids(list(blocks), 100, "the")
        read = BlockRead(peer, ids, ids, time.monotonic() + timeout_s)
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
    assert h.mover.num_recycles == 0


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
    h.link.dead.add(PEER)
    assert isinstance(h.failure(dying.future), PeerGone)
    h.until_settled(range(0, 2))
    assert h.link.dropped == [PEER]
    h.link.land_all()
    assert healthy.future.result(5).num_bytes == 20


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
    mover = Mover(link, block_bytes=1, num_blocks=1, limits=MoverLimits(), name="unopened")
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
            block_bytes=BLOCK_BYTES,
            num_blocks=100,
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
            if not piece.has_landed and not piece.is_cancelled and piece.peer not in self.link.dead
            for block in piece.local
        }

    def act(self) -> None:
        roll, link = self.rng.random(), self.link
        peer = self.rng.choice([PEER, OTHER])
        if roll < 0.25 and len(self.free) > 8:
            blocks = self.rng.sample(sorted(self.free), self.rng.randrange(1, 8))
            self.free -= set(blocks)
            ids = checked_ids(blocks, 100, "the")
            read = BlockRead(peer, ids, ids, self.clock.now() + self.rng.choice([1.0, 9.0]))
            self.open.append(read)
            self.mover.read(read)
        elif roll < 0.55 and link.pieces:
            self.rng.choice(link.pieces).has_landed = True
        elif roll < 0.60 and self.open:
            self.cancel(self.rng.choice(self.open))
        elif roll < 0.603:
            link.dead.add(peer)
        elif roll < 0.62:
            link.dead.discard(peer)
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
        self.withheld |= set(read.local.tolist())
        self.outcomes["cancelled"] += 1
        self.mover.give_up(read)

    def account(self) -> None:
        for read in [r for r in self.open if r.future.done() and self.rng.random() < 0.9]:
            self.open.remove(read)
            blocks = set(read.local.tolist())
            error = read.future.exception()
            self.outcomes[type(error).__name__] += 1
            if isinstance(error, TransferTimeout):
                self.withheld |= blocks
                continue
            assert not blocks & self.writable(), "ended while a piece may still land"
            self.free |= blocks
        undecided = {b for r in self.open if r.future.done() for b in r.local.tolist()}
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
    assert walk.outcomes["NoneType"] > 300 and walk.mover.num_recycles > 10
    walk.link.recycle_error = None
    walk.link.dead.clear()
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
