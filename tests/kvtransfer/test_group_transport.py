"""Groups of ranks as one transport: connections, reads that end on all ranks, settled blocks.

Every test runs with the ranks in place, and with all but the first behind a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest

from baton.core.block import BlockId
from baton.core.errors import (
    BadPeerCard,
    IncompatiblePeer,
    PeerGone,
    TransferError,
    TransferTimeout,
)
from baton.core.worker_info import Epoch, WorkerId
from group_ranks import LAYOUT, NONCE, SECRET, HandRank, HandRead, hand_ranks
from kvtransfer.group_card import join_cards
from kvtransfer.group_transport import GroupTransport, RankTransport
from kvtransfer.rank_proxy import RankProxy
from kvtransfer.rank_server import serve_rank
from kvtransfer.transport import ReadStats

PEER = WorkerId("prefill-0")


@dataclass
class Group:
    transport: GroupTransport
    ranks: list[HandRank]
    sockets: list[socket.socket] = field(default_factory=list)
    """The ends of ranks 1, 2, ..., where they are behind sockets."""

    async def connect(self, owner_size: int, *, epoch: str = "p1", block_size: int = 16) -> None:
        assert await self.transport.connect(
            card_of(owner_size, epoch=epoch, block_size=block_size), nonce=NONCE
        ) == (PEER, Epoch(epoch))

    def read(self, ids: list[int], remote: list[int] | None = None) -> asyncio.Task[ReadStats]:
        here = [BlockId(i) for i in ids]
        there = here if remote is None else [BlockId(i) for i in remote]
        return asyncio.create_task(self.transport.read(PEER, there, here, timeout_s=10.0))

    async def reads(self, count: int) -> list[HandRead]:
        """The parts that have arrived at the ranks, once there are so many."""
        await until(lambda: len(self.all_reads) == count)
        return self.all_reads

    @property
    def all_reads(self) -> list[HandRead]:
        return [read for rank in self.ranks for read in rank.reads]

    def settle(self, read: HandRead) -> None:
        next(rank for rank in self.ranks if read in rank.reads).settle(read)


def card_of(size: int, *, epoch: str = "p1", block_size: int = 16) -> bytes:
    layout = replace(LAYOUT, block_size=block_size)
    ranks = hand_ranks(size, layout=layout, worker_id=PEER, epoch=epoch)
    return join_cards([rank.card(NONCE) for rank in ranks])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(params=["in place", "behind sockets"])
async def make_group(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., object]]:
    made: list[Group] = []
    served: list[asyncio.Task[None]] = []

    async def make(size: int, **changes: object) -> Group:
        ranks = hand_ranks(size, **changes)
        transports: list[RankTransport] = [*ranks]
        ends = []
        if request.param == "behind sockets":
            for rank in range(1, size):
                ours, theirs = socket.socketpair()
                ends.append(theirs)
                served.append(asyncio.create_task(serve_rank(theirs, ranks[rank])))
                transports[rank] = await RankProxy.open(
                    ours, rank=rank, secret=SECRET, timeout_s=5.0
                )
        transport = GroupTransport(transports, region=ranks[0].region, secret=SECRET)
        made.append(Group(transport, ranks, ends))
        return made[-1]

    yield make
    for group in made:
        with contextlib.suppress(TransferError):
            await group.transport.close()
        assert not group.transport._reads
        assert group.transport._quarantine.is_empty
    await asyncio.wait_for(asyncio.gather(*served), 5)
    assert all(rank.is_closed for group in made for rank in group.ranks)


@pytest.mark.parametrize("owner_size", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
async def test_every_rank_reads_its_parts(make_group, size, owner_size):
    group = await make_group(size)
    await group.connect(owner_size)
    assert sum(len(rank.peers) for rank in group.ranks) == max(size, owner_size)
    task = group.read([3, 4])
    for read in await group.reads(max(size, owner_size)):
        assert read.local == [3, 4]
        assert not task.done()
        read.land()
    stats = await task
    assert stats == ReadStats(200 * max(size, owner_size), max(size, owner_size), 0.5)
    assert group.transport.settled() == []


async def test_one_failed_rank_fails_the_read_and_ends_it_on_the_others(make_group):
    group = await make_group(4)
    await group.connect(2)
    task = group.read([3, 4])
    reads = await group.reads(4)
    reads[0].land()
    reads[2].fail(TransferTimeout("late"))
    with pytest.raises(TransferTimeout, match="late"):
        await task
    await until(lambda: [r.is_given_up for r in reads] == [False, True, True, True])
    group.settle(reads[1])
    group.settle(reads[2])
    await asyncio.sleep(0.05)
    assert group.transport.settled() == []
    group.settle(reads[3])
    assert await settled(group, 2) == [3, 4]


async def settled(group: Group, count: int) -> list[int]:
    found: list[int] = []

    def poll() -> bool:
        found.extend(group.transport.settled())
        return len(found) >= count

    await until(poll)
    await asyncio.sleep(0.03)
    return sorted([*found, *group.transport.settled()])


async def test_a_dead_peer_is_reported_when_no_rank_is_written_to_any_more(make_group):
    group = await make_group(2)
    await group.connect(2)
    task = group.read([1])
    reads = await group.reads(2)
    reads[0].land()
    reads[1].fail(PeerGone("its process has ended"))
    with pytest.raises(PeerGone, match="its process has ended"):
        await task
    assert group.transport.settled() == []


async def test_a_dead_peer_with_reads_in_flight_elsewhere_quarantines(make_group):
    group = await make_group(2)
    await group.connect(2)
    task = group.read([1])
    reads = await group.reads(2)
    reads[0].fail(PeerGone("its process has ended"))
    with pytest.raises(TransferTimeout, match="its process has ended"):
        await task
    await until(lambda: reads[1].is_given_up)
    group.settle(reads[1])
    assert await settled(group, 1) == [1]


async def test_refused_ids_leave_nothing_behind(make_group):
    group = await make_group(2)
    await group.connect(2)
    with pytest.raises(TransferError, match="block id 8 is outside") as caught:
        await group.read([8])
    assert [rank.reads for rank in group.ranks] == [[], []]
    assert not isinstance(caught.value, PeerGone | TransferTimeout)
    assert group.transport.settled() == []


async def test_a_cancelled_read_is_given_up_on_all_ranks(make_group):
    group = await make_group(2)
    await group.connect(4)
    task = group.read([5, 6])
    reads = await group.reads(4)
    reads[0].land()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: [r.is_given_up for r in reads] == [False, True, True, True])
    for read in reads[1:]:
        assert group.transport.settled() == []
        group.settle(read)
    assert await settled(group, 2) == [5, 6]


async def test_a_read_cancelled_when_it_has_landed_is_settled_at_once(make_group):
    group = await make_group(2)
    await group.connect(2)
    task = group.read([5])
    for read in await group.reads(2):
        read.land()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await settled(group, 1) == [5]


async def test_a_read_cancelled_before_it_began_is_settled_at_once(make_group):
    group = await make_group(2)
    await group.connect(2)
    task = group.read([5])
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    for rank in group.ranks:
        for read in rank.reads:
            rank.settle(read)
    assert await settled(group, 1) == [5]


async def test_units_of_smaller_blocks_are_settled_as_blocks(make_group):
    group = await make_group(2, layout=replace(LAYOUT, block_size=64))
    await group.connect(2)
    assert group.transport.units_per_block(PEER) == (1, 4)
    task = group.read([4, 5, 8], remote=[0, 1, 2])
    reads = await group.reads(2)
    task.cancel()
    await until(lambda: all(r.is_given_up for r in reads))
    for read in reads:
        group.settle(read)
    assert await settled(group, 2) == [1, 2]


@pytest.mark.parametrize("seed", range(3))
async def test_random_ends_settle_every_block_of_given_up_reads_once(make_group, seed):
    """Reads of one block each that land, fail, are cancelled, and settle late."""
    rng = random.Random(seed)
    group = await make_group(2, num_blocks=64)
    await group.connect(4)
    expected: Counter[int] = Counter()
    found: Counter[int] = Counter()
    settled_reads: set[int] = set()

    def settle_some(share: float) -> None:
        for read in group.all_reads:
            if read.is_given_up and id(read) not in settled_reads and rng.random() < share:
                settled_reads.add(id(read))
                group.settle(read)
        found.update(group.transport.settled())

    for block in range(60):
        task = group.read([block], remote=[0])
        for _ in range(rng.randrange(1, 5)):
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            task.cancel()
        await asyncio.sleep(rng.choice([0, 0.002]))
        while not task.done():
            for read in group.all_reads:
                if not read.future.done() and rng.random() < 0.5:
                    end_somehow(read, rng)
            if rng.random() < 0.1:
                task.cancel()
            await asyncio.sleep(0)
        if task.cancelled() or isinstance(task.exception(), TransferTimeout):
            expected[block] += 1
        settle_some(0.3)
    assert len(expected) > 20
    async with asyncio.timeout(5):
        while found != expected:
            settle_some(1.0)
            await asyncio.sleep(0.001)


def end_somehow(read: HandRead, rng: random.Random) -> None:
    match rng.randrange(6):
        case 0:
            read.fail(TransferTimeout("late"))
        case 1:
            read.fail(PeerGone("gone"))
        case _:
            read.land()


async def test_a_rank_that_refuses_a_new_peer_leaves_no_rank_connected(make_group):
    group = await make_group(2)
    group.ranks[1].refusal = IncompatiblePeer("not readable from here")
    with pytest.raises(IncompatiblePeer, match="not readable from here"):
        await group.connect(2)
    assert [rank.peers for rank in group.ranks] == [{}, {}]
    with pytest.raises(PeerGone, match="prefill-0 is not connected"):
        await group.read([1])


async def test_a_useless_card_does_not_cost_a_good_peer(make_group):
    group = await make_group(2)
    await group.connect(2)
    group.ranks[1].refusal = PeerGone("busy")
    with pytest.raises(PeerGone, match="busy"):
        await group.connect(2)
    group.ranks[1].refusal = None
    task = group.read([1])
    for read in await group.reads(2):
        read.land()
    await task


async def test_a_restarted_peer_with_another_number_of_ranks(make_group):
    group = await make_group(2)
    await group.connect(4)
    await group.connect(1, epoch="p2")
    assert [set(rank.peers) for rank in group.ranks] == [{PEER}, {PEER}]
    await group.transport.disconnect(PEER)
    assert [rank.peers for rank in group.ranks] == [{}, {}]
    assert group.transport.link(PEER) is None


async def test_the_report_is_of_the_worker_as_a_whole(make_group):
    group = await make_group(2)
    await group.connect(4)
    for report in (
        group.transport.link(PEER),
        await group.transport.measure(PEER, num_rounds=1, timeout_s=1.0),
    ):
        assert report is not None
        assert (report.peer_id, report.peer_epoch, report.transport) == (PEER, "p1", "hand")
        assert report.lane == "lane 0, lane 1, lane 2, lane 3"
        assert report.bytes_per_second == 200.0
        assert report.latency_s == 0.25


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (lambda cards: join_cards(cards)[:-1], "holds a card of"),
        (lambda cards: join_cards(cards)[:20], "cut short|holds a card of"),
        (lambda cards: join_cards(cards) + b"x", "1 bytes too many"),
        (lambda cards: join_cards(cards[:1]), "is of rank 0 of 2"),
        (lambda cards: join_cards([cards[1], cards[0]]), "is of rank 1 of 2"),
        (lambda cards: join_cards([*cards, cards[1]]), "card 0 of 3"),
        (lambda cards: join_cards([cards[0], cards[0][:-1] + b"x"]), "wrong signature"),
        (lambda cards: join_cards([cards[0], other_card(epoch="p2")]), "not of one worker"),
        (
            lambda cards: join_cards([cards[0], other_card(num_blocks=9)]),
            "sizes: 9 and 8",
        ),
        (lambda cards: b"baton group card" + bytes(2), "group card of 0 ranks"),
        (lambda cards: b"baton group card\xff\xff", "group card of 65535 ranks"),
        (lambda cards: b"baton group card\x00\x02\xff\xff\xff\xff", "card of 4294967295 bytes"),
    ],
)
async def test_bad_group_cards_are_refused(make_group, wire, reason):
    group = await make_group(2)
    cards = [rank.card(NONCE) for rank in hand_ranks(2, worker_id=PEER, epoch="p1")]
    with pytest.raises(BadPeerCard, match=reason):
        await group.transport.connect(wire(cards), nonce=NONCE)
    assert [rank.peers for rank in group.ranks] == [{}, {}]


def other_card(*, epoch: str = "p1", num_blocks: int = 8) -> bytes:
    """Of rank 1 of 2."""
    return hand_ranks(2, worker_id=PEER, epoch=epoch, num_blocks=num_blocks)[1].card(NONCE)


async def test_rebuilt_links_of_all_ranks_are_counted(make_group):
    group = await make_group(2)
    group.ranks[0].num_recycles, group.ranks[1].num_recycles = 1, 2
    await until(lambda: group.transport.num_recycles == 3)


async def test_a_peer_of_another_model_is_refused_before_any_rank_is_asked(make_group):
    group = await make_group(2, layout=replace(LAYOUT, head_dim=8))
    with pytest.raises(IncompatiblePeer, match="head_dim: 8 here, 2 there"):
        await group.connect(2)


async def test_a_closed_group_answers_with_an_error(make_group):
    group = await make_group(2)
    await group.connect(2)
    await group.transport.close()
    with pytest.raises(PeerGone):
        await group.read([1])
    await group.transport.close()
