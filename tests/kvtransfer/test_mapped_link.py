"""Reads from mapped pools of other processes, by the kernel that runs on GPUs, interpreted."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from baton.core.block import BlockId
from baton.core.errors import IncompatiblePeer, PeerGone, TransferError, TransferTimeout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer import mapped_link
from kvtransfer.block_read import MoverLimits
from kvtransfer.group_transport import GroupTransport
from kvtransfer.mapped_link import MappedLink, PieceCopier, cuda_link
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.plan import RankPool
from kvtransfer.shm_transport import ShmPool
from kvtransfer.transport import PoolRegion
from mapped_files import (
    SECRET,
    FileMapper,
    Owner,
    as_blocks,
    layout_of,
    region_of,
    start_owner,
    token_pattern,
)
from triton_interpreter import complete_interpreter

HEADS, NUM_TOKENS = 4, 128
INTERPRETER = threading.Lock()


@pytest.fixture(autouse=True)
def completed_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    complete_interpreter(monkeypatch)


@pytest.fixture(scope="module")
def owners() -> Iterator[Any]:
    started: dict[tuple[int, int, str], Owner] = {}

    def owner(tp_size: int, block_size: int, name: str = "p") -> Owner:
        key = (tp_size, block_size, name)
        if key not in started:
            started[key] = Owner([start(name, r, tp_size, block_size) for r in range(tp_size)])
        return started[key]

    yield owner
    for one in started.values():
        one.stop()


def start(name: str, rank: int, size: int, block_size: int) -> subprocess.Popen[str]:
    return start_owner(
        worker_id=name,
        epoch="e1",
        heads=HEADS,
        block_size=block_size,
        num_blocks=NUM_TOKENS // block_size,
        tp_rank=rank,
        tp_size=size,
    )


@dataclass
class Rank:
    """One rank of the reader, in this process."""

    pool: RankPool
    memory: ShmPool
    mapper: FileMapper
    transport: MoverTransport

    @property
    def words(self) -> NDArray[np.uint16]:
        return np.frombuffer(self.memory.memory, dtype=np.uint16)


def interpreted_copier() -> PieceCopier:
    from kernels.piece_stream import PieceStream

    class Interpreted(PieceStream):
        """The interpreter runs one kernel of a process at a time."""

        def prepare(self, *arguments: Any) -> Any:
            with INTERPRETER:
                return super().prepare(*arguments)

        def start(self, *arguments: Any) -> Any:
            with INTERPRETER:
                return super().start(*arguments)

    return Interpreted(None)


def open_rank(rank: int, size: int, block_size: int, make_copier: Any = None) -> Rank:
    num_blocks = NUM_TOKENS // block_size + 2
    pool = RankPool(layout_of(HEADS, block_size), rank, size, num_blocks)
    memory = ShmPool.create(pool.num_bytes)
    region = region_of(pool, memory.address, num_scratch_blocks=2)
    mapper = FileMapper(memory)
    transport = MoverTransport(
        links=[MappedLink(region, mapper, make_copier or interpreted_copier)],
        region=region,
        identity=PeerIdentity(WorkerId("d"), Epoch("e2")),
        secret=SECRET,
        limits=MoverLimits(max_piece_bytes=1 << 30, max_bytes_in_flight=1 << 30),
    )
    return Rank(pool, memory, mapper, transport)


@dataclass
class Reader:
    ranks: list[Rank]
    transport: GroupTransport
    opened: list[Rank] = field(default_factory=list)


@pytest.fixture
async def open_reader() -> AsyncIterator[Any]:
    opened: list[Reader] = []

    def make(size: int, block_size: int, make_copier: Any = None) -> Reader:
        ranks = [open_rank(rank, size, block_size, make_copier) for rank in range(size)]
        region = ranks[0].transport._region
        transport = GroupTransport([r.transport for r in ranks], region=region, secret=SECRET)
        opened.append(Reader(ranks, transport))
        return opened[-1]

    yield make
    for reader in opened:
        await reader.transport.close()
        assert [rank.mapper.num_mapped for rank in reader.ranks] == [0] * len(reader.ranks)
        for rank in reader.ranks:
            rank.memory.close()


async def connect(reader: Reader, owner: Owner) -> WorkerId:
    nonce = secrets.token_bytes(16)
    peer, _ = await reader.transport.connect(owner.card(nonce), nonce=nonce)
    return peer


def ids(*values: int) -> list[BlockId]:
    return [BlockId(value) for value in values]


@pytest.mark.parametrize(
    ("owner_shape", "reader_shape"),
    [
        ((1, 16), (1, 16)),
        ((2, 16), (1, 16)),
        ((1, 16), (2, 16)),
        ((2, 16), (4, 16)),
        ((2, 16), (1, 64)),
        ((1, 64), (2, 16)),
        ((2, 16), (2, 64)),
    ],
)
async def test_blocks_arrive_at_all_ranks(owners, open_reader, owner_shape, reader_shape):
    """Half of the units go to random places; the rest of every pool stays untouched."""
    reader = open_reader(*reader_shape)
    peer = await connect(reader, owners(*owner_shape))
    report = reader.transport.link(peer)
    assert report is not None
    assert report.transport == "mapped"
    assert report.bytes_per_second > 0
    unit_tokens = min(owner_shape[1], reader_shape[1])
    num_units = NUM_TOKENS // unit_tokens
    rng = np.random.default_rng(1)
    there = rng.permutation(num_units)[: num_units // 2]
    here = rng.permutation(num_units)[: num_units // 2]
    for rank in reader.ranks:
        rank.words[:] = 0
    stats = await reader.transport.read(
        peer, ids(*there.tolist()), ids(*here.tolist()), timeout_s=30.0
    )
    num_bytes = 0
    for rank in reader.ranks:
        tokens = token_pattern(rank.pool, NUM_TOKENS)
        arrived = np.zeros_like(tokens).reshape(num_units, -1)
        arrived[here] = tokens.reshape(num_units, -1)[there]
        expected = as_blocks(arrived.reshape(tokens.shape), rank.pool)
        found = rank.words.reshape(rank.pool.num_blocks, -1)
        np.testing.assert_array_equal(found[:-2], expected.reshape(len(expected), -1))
        assert not found[-2:].any()
        num_bytes += arrived[here].nbytes
    assert stats.num_bytes == num_bytes
    await reader.transport.disconnect(peer)
    assert [rank.mapper.num_mapped for rank in reader.ranks] == [0] * len(reader.ranks)


@pytest.mark.parametrize(
    ("owner_shape", "reader_shape"), [((1, 16), (1, 16)), ((2, 16), (4, 16)), ((2, 16), (1, 64))]
)
async def test_layers_of_blocks_arrive_and_no_others(
    owners, open_reader, owner_shape, reader_shape
):
    reader = open_reader(*reader_shape)
    peer = await connect(reader, owners(*owner_shape))
    num_layers = reader.transport.num_layers(peer)
    assert num_layers == reader.ranks[0].pool.layout.num_layers > 1
    unit_tokens = min(owner_shape[1], reader_shape[1])
    units = np.random.default_rng(2).permutation(NUM_TOKENS // unit_tokens)[:5]
    for rank in reader.ranks:
        rank.words[:] = 0
    await reader.transport.read(
        peer,
        ids(*units.tolist()),
        ids(*units.tolist()),
        timeout_s=30.0,
        layers=range(1, num_layers),
    )
    for rank in reader.ranks:
        tokens = token_pattern(rank.pool, NUM_TOKENS)
        arrived = np.zeros_like(tokens)
        for unit in units:
            part = slice(unit * unit_tokens, (unit + 1) * unit_tokens)
            # [tokens, heads, layers, 2, head_dim]
            arrived[part, :, 1:] = tokens[part, :, 1:]
        expected = as_blocks(arrived, rank.pool)
        found = rank.words.reshape(rank.pool.num_blocks, -1)
        np.testing.assert_array_equal(found[:-2], expected.reshape(len(expected), -1))
        assert not found[-2:].any()


async def test_a_killed_owner_is_gone_and_its_memory_is_unmapped(owners, open_reader):
    reader = open_reader(1, 16)
    owner = owners(2, 16, "killed")
    peer = await connect(reader, owner)
    assert reader.ranks[0].mapper.num_mapped == 2
    owner.processes[1].kill()
    owner.processes[1].wait(10)
    with pytest.raises(PeerGone, match="its process has ended"):
        await reader.transport.read(peer, ids(1), ids(1), timeout_s=10.0)
    assert reader.ranks[0].mapper.num_mapped == 1
    assert reader.transport.settled() == []


async def test_a_restarted_owner_is_mapped_anew(owners, open_reader):
    reader = open_reader(1, 16)
    first, second = owners(1, 16, "again"), Owner([start("again", 0, 1, 16)])
    owners_of_name = (first, second)
    for owner in owners_of_name:
        assert await connect(reader, owner) == "again"
        await reader.transport.read(WorkerId("again"), ids(1), ids(1), timeout_s=10.0)
        assert reader.ranks[0].mapper.num_mapped == 1
    second.stop()


@dataclass
class HandLaunch:
    """Ends when the test says so."""

    has_ended: bool = False
    error: str = ""

    def is_done(self) -> bool:
        if self.error:
            raise RuntimeError(self.error)
        return self.has_ended

    def wait(self, timeout_s: float) -> bool:
        return self.is_done()


class HandCopier:
    """Implements `PieceCopier`; copies nothing."""

    def __init__(self) -> None:
        self.launches: list[HandLaunch] = []
        self.ends_at_once = True
        self.refusal = ""

    def side(self, address: int, offsets: Any, **sizes: int) -> object:
        if self.refusal:
            raise RuntimeError(self.refusal)
        return object()

    def prepare(self, src: Any, dst: Any) -> object:
        return object()

    def start(self, pieces: Any, src_units: Any, dst_units: Any) -> HandLaunch:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.launches.append(HandLaunch(self.ends_at_once))
        return self.launches[-1]

    async def next_launch(self) -> HandLaunch:
        """Of a read that does not end by itself."""
        async with asyncio.timeout(5):
            while self.ends_at_once or not self.launches:
                await asyncio.sleep(0.001)
        return self.launches[-1]


async def start_read(
    owners: Any, open_reader: Any, name: str, timeout_s: float = 30.0
) -> tuple[Reader, HandCopier, Owner, asyncio.Task[Any], HandLaunch]:
    copier = HandCopier()
    reader = open_reader(1, 16, lambda: copier)
    owner = owners(1, 16, name)
    peer = await connect(reader, owner)
    copier.launches.clear()
    copier.ends_at_once = False
    task = asyncio.create_task(
        reader.transport.read(peer, ids(1, 2), ids(3, 4), timeout_s=timeout_s)
    )
    return reader, copier, owner, task, await copier.next_launch()


async def test_a_read_is_done_when_its_launch_has_ended(owners, open_reader):
    *_, task, launch = await start_read(owners, open_reader, "p")
    await asyncio.sleep(0.02)
    assert not task.done()
    launch.has_ended = True
    assert (await task).num_bytes == 2 * HEADS * layout_of(HEADS, 16).head_bytes


async def test_a_given_up_launch_that_has_ended_is_settled_at_once(owners, open_reader):
    reader, *_, task, launch = await start_read(owners, open_reader, "p")
    launch.has_ended = True
    task.cancel()
    await asyncio.sleep(0.05)
    assert sorted(reader.transport.settled()) == [3, 4]


async def test_a_launch_that_hangs_holds_its_blocks_and_the_mapping(owners, open_reader):
    reader, *_, task, launch = await start_read(owners, open_reader, "p", timeout_s=0.05)
    with pytest.raises(TransferTimeout, match="passed its deadline"):
        await task
    await reader.transport.disconnect(WorkerId("p"))
    await asyncio.sleep(0.05)
    assert reader.transport.settled() == []
    assert reader.ranks[0].mapper.num_mapped == 1
    launch.has_ended = True
    async with asyncio.timeout(5):
        while not (settled := reader.transport.settled()):
            await asyncio.sleep(0.005)
    assert sorted(settled) == [3, 4]


async def test_an_owner_that_dies_under_a_launch_stays_mapped_until_it_has_ended(
    owners, open_reader
):
    reader, _, owner, task, launch = await start_read(owners, open_reader, "dies")
    owner.processes[0].kill()
    owner.processes[0].wait(10)
    await asyncio.sleep(0.05)
    assert not task.done()
    assert reader.ranks[0].mapper.num_mapped == 1
    launch.has_ended = True
    with pytest.raises(PeerGone, match="its process has ended"):
        await task
    assert reader.ranks[0].mapper.num_mapped == 0
    assert reader.transport.settled() == []


async def test_an_error_of_the_gpu_fails_the_read_and_settles_it(owners, open_reader):
    reader, _, _, task, launch = await start_read(owners, open_reader, "p")
    launch.error = "an illegal memory access was encountered\nCompile with ..."
    with pytest.raises(TransferError, match="error: an illegal memory access was encountered"):
        await task
    async with asyncio.timeout(5):
        while await asyncio.sleep(0.005, reader.ranks[0].transport.num_recycles) == 0:
            pass


async def test_a_gpu_that_refuses_a_peer_says_so(owners, open_reader):
    copier = HandCopier()
    reader = open_reader(1, 16, lambda: copier)
    copier.refusal = "out of memory\nmore"
    with pytest.raises(IncompatiblePeer, match=r"the pool of p cannot be read: out of memory$"):
        await connect(reader, owners(1, 16))
    assert reader.ranks[0].mapper.num_mapped == 0


async def test_a_copy_that_never_ends_is_left_mapped_at_the_end(
    owners, open_reader, monkeypatch, caplog
):
    monkeypatch.setattr(mapped_link, "END_TIMEOUT_S", 0.01)
    reader, *_, task, launch = await start_read(owners, open_reader, "p")
    await reader.transport.close()
    with pytest.raises(TransferTimeout):
        await task
    assert "a copy from p does not end; it stays mapped" in caplog.text
    assert reader.ranks[0].mapper.num_mapped == 1
    launch.has_ended = True
    link = reader.ranks[0].transport._links.links[0]
    link.close()


def test_host_memory_is_not_mapped_by_handle():
    region = PoolRegion(1 << 20, 1 << 20, 4, layout_of(HEADS, 16))
    with pytest.raises(TransferError, match="host memory"):
        cuda_link(region)
    assert cuda_link(replace(region, device_id=0)).endpoint is None
