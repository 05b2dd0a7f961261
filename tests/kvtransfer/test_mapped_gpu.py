"""Reads between processes on GPUs: one card is enough, several are used in turn."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baton.core.block import BlockId
from baton.core.errors import PeerGone
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.block_read import MoverLimits
from kvtransfer.group_transport import GroupTransport
from kvtransfer.mapped_link import MappedLink
from kvtransfer.mapped_memory import CudaMapper
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.nixl_library import is_installed
from kvtransfer.plan import RankPool
from kvtransfer.select import create_transport
from mapped_files import (
    SECRET,
    Owner,
    as_blocks,
    layout_of,
    region_of,
    start_owner,
    start_script,
    token_pattern,
)

pytestmark = pytest.mark.gpu
HEADS, NUM_TOKENS, NUM_SCRATCH = 4, 256, 2
PEER = WorkerId("p")
CHILD = Path(__file__).parents[1] / "support" / "gpu_reader_child.py"

kinds = pytest.mark.parametrize(
    "kind",
    [
        "mapped",
        pytest.param(
            "nixl", marks=pytest.mark.skipif(not is_installed(), reason="NIXL is not installed")
        ),
    ],
)


def device_of(number: int) -> int:
    return number % torch.cuda.device_count()


@dataclass
class Reader:
    pools: list[RankPool]
    memories: list[torch.Tensor]
    transport: GroupTransport

    async def connect(self, owner: Owner) -> None:
        nonce = secrets.token_bytes(16)
        card = await asyncio.to_thread(owner.card, nonce)
        assert (await self.transport.connect(card, nonce=nonce))[0] == PEER

    def content(self, rank: int) -> np.ndarray:
        words = self.memories[rank].cpu().numpy().view(np.uint16)
        return words.reshape(self.pools[rank].num_blocks, -1)


@pytest.fixture
async def pair() -> AsyncIterator[Any]:
    """(owner shape, reader shape, transport) -> both; shapes are ranks and block size."""
    opened: list[tuple[Owner, Reader]] = []

    def make(
        owner_shape: tuple[int, int], reader_shape: tuple[int, int], kind: str
    ) -> tuple[Owner, Reader]:
        size, block_size = owner_shape
        processes = [
            start_owner(
                worker_id=PEER,
                epoch="e1",
                heads=HEADS,
                block_size=block_size,
                num_blocks=NUM_TOKENS // block_size,
                tp_rank=rank,
                tp_size=size,
                device_id=device_of(rank),
                kind=kind,
            )
            for rank in range(size)
        ]
        reader_size, reader_block_size = reader_shape
        pools, memories, transports = [], [], []
        for rank in range(reader_size):
            num_blocks = NUM_TOKENS // reader_block_size + NUM_SCRATCH
            layout = layout_of(HEADS, reader_block_size)
            pools.append(RankPool(layout, rank, reader_size, num_blocks))
            device_id = device_of(size + rank)
            memories.append(
                torch.zeros(pools[-1].num_bytes // 2, dtype=torch.int16, device=f"cuda:{device_id}")
            )
            region = region_of(
                pools[-1],
                memories[-1].data_ptr(),
                device_id=device_id,
                num_scratch_blocks=NUM_SCRATCH,
            )
            identity = PeerIdentity(WorkerId("d"), Epoch("e2"))
            transports.append(create_transport(kind, region, identity, SECRET))
        transport = GroupTransport(
            transports, region=region_of(pools[0], 0, num_scratch_blocks=NUM_SCRATCH), secret=SECRET
        )
        opened.append((Owner(processes), Reader(pools, memories, transport)))
        return opened[-1]

    yield make
    for owner, reader in opened:
        await reader.transport.close()
        owner.stop()


def ids(values: np.ndarray | list[int]) -> list[BlockId]:
    return [BlockId(int(value)) for value in values]


@kinds
@pytest.mark.parametrize(
    ("owner_shape", "reader_shape"),
    [((1, 64), (1, 64)), ((2, 64), (1, 64)), ((1, 64), (2, 64)), ((2, 16), (1, 64))],
)
async def test_blocks_arrive_from_another_process(pair, kind, owner_shape, reader_shape):
    owner, reader = pair(owner_shape, reader_shape, kind)
    await reader.connect(owner)
    report = reader.transport.link(PEER)
    assert report is not None
    assert report.transport == kind
    num_units = NUM_TOKENS // min(owner_shape[1], reader_shape[1])
    rng = np.random.default_rng(1)
    there = rng.permutation(num_units)[: num_units // 2]
    here = rng.permutation(num_units)[: num_units // 2]
    for memory in reader.memories:
        memory.zero_()
    torch.cuda.synchronize()
    await reader.transport.read(PEER, ids(there), ids(here), timeout_s=30.0)
    for rank, pool in enumerate(reader.pools):
        tokens = token_pattern(pool, NUM_TOKENS)
        arrived = np.zeros_like(tokens).reshape(num_units, -1)
        arrived[here] = tokens.reshape(num_units, -1)[there]
        expected = as_blocks(arrived.reshape(tokens.shape), pool)
        found = reader.content(rank)
        np.testing.assert_array_equal(found[:-NUM_SCRATCH], expected.reshape(len(expected), -1))
        assert not found[-NUM_SCRATCH:].any()


@pytest.mark.parametrize(
    ("owner_shape", "reader_shape"), [((1, 64), (1, 64)), ((2, 64), (1, 64)), ((2, 16), (1, 64))]
)
async def test_layers_of_blocks_arrive_and_no_others(pair, owner_shape, reader_shape):
    owner, reader = pair(owner_shape, reader_shape, "mapped")
    await reader.connect(owner)
    num_layers = reader.transport.num_layers(PEER)
    unit_tokens = min(owner_shape[1], reader_shape[1])
    units = np.random.default_rng(2).permutation(NUM_TOKENS // unit_tokens)[:3]
    for memory in reader.memories:
        memory.zero_()
    torch.cuda.synchronize()
    await reader.transport.read(
        PEER, ids(units), ids(units), timeout_s=30.0, layers=range(1, num_layers)
    )
    for rank, pool in enumerate(reader.pools):
        tokens = token_pattern(pool, NUM_TOKENS)
        arrived = np.zeros_like(tokens)
        for unit in units:
            part = slice(unit * unit_tokens, (unit + 1) * unit_tokens)
            arrived[part, :, 1:] = tokens[part, :, 1:]
        expected = as_blocks(arrived, pool)
        found = reader.content(rank)
        np.testing.assert_array_equal(found[:-NUM_SCRATCH], expected.reshape(len(expected), -1))


@kinds
async def test_an_owner_killed_while_it_is_read_leaves_the_gpu_usable(pair, kind):
    owner, reader = pair((1, 64), (1, 64), kind)
    await reader.connect(owner)
    blocks = ids(list(range(NUM_TOKENS // 64)))

    async def read_on() -> None:
        while True:
            await reader.transport.read(PEER, blocks, blocks, timeout_s=10.0)

    reading = asyncio.create_task(read_on())
    await asyncio.sleep(0.2)
    owner.processes[0].kill()
    with pytest.raises(PeerGone):
        await asyncio.wait_for(reading, 30)
    assert reader.transport.settled() == []
    x = torch.randn(64, 64, device=reader.memories[0].device)
    torch.testing.assert_close(x @ torch.eye(64, device=x.device), x)
    owner.processes[0].wait()


async def test_what_arrived_is_seen_by_the_next_launch(pair):
    """Nothing waits for the copy but the read itself: the compute stream needs no event."""
    owner, reader = pair((1, 64), (1, 64), "mapped")
    await reader.connect(owner)
    compute = torch.cuda.Stream(reader.memories[0].device)
    expected = torch.from_numpy(
        as_blocks(token_pattern(reader.pools[0], NUM_TOKENS), reader.pools[0]).view(np.int16)
    ).reshape(NUM_TOKENS // 64, -1)
    for _ in range(50):
        reader.memories[0].zero_()
        torch.cuda.synchronize()
        blocks = ids(list(range(NUM_TOKENS // 64)))
        await reader.transport.read(PEER, blocks, blocks, timeout_s=10.0)
        with torch.cuda.stream(compute):
            seen = reader.memories[0].clone()
        compute.synchronize()
        assert torch.equal(seen.cpu()[: expected.numel()], expected.flatten())


async def test_an_owner_killed_in_the_middle_of_a_launch_leaves_the_gpu_usable():
    """A launch that takes a second and more, because one program copies the same blocks over and
    over."""
    from kernels.piece_stream import PieceStream

    num_blocks = NUM_TOKENS // 64
    process = start_owner(
        worker_id=PEER,
        epoch="e1",
        heads=HEADS,
        block_size=64,
        num_blocks=num_blocks,
        tp_rank=0,
        tp_size=1,
        device_id=device_of(0),
        kind="mapped",
    )
    device_id = device_of(1)
    pool = RankPool(layout_of(HEADS, 64), 0, 1, num_blocks + NUM_SCRATCH)
    memory = torch.zeros(pool.num_bytes, dtype=torch.uint8, device=f"cuda:{device_id}")
    region = region_of(pool, memory.data_ptr(), device_id=device_id, num_scratch_blocks=NUM_SCRATCH)
    transport = MoverTransport(
        links=[
            MappedLink(
                region, CudaMapper(device_id), lambda: PieceStream(device_id, max_programs=1)
            )
        ],
        region=region,
        identity=PeerIdentity(WorkerId("d"), Epoch("e2")),
        secret=SECRET,
        limits=MoverLimits(max_piece_bytes=1 << 40, max_bytes_in_flight=1 << 40),
    )
    owner = Owner([process])
    try:
        nonce = secrets.token_bytes(16)
        card = await asyncio.to_thread(owner.card, nonce)
        name, _ = await transport.connect(card, nonce=nonce)
        blocks = ids(list(range(num_blocks)) * 500_000)
        reading = asyncio.create_task(transport.read(name, blocks, blocks, timeout_s=20.0))
        await asyncio.sleep(0.5)
        assert not reading.done()
        process.kill()
        # Its memory is gone for good while the launch still has most of its way to go.
        process.wait()
        assert not reading.done()
        with pytest.raises(PeerGone):
            await asyncio.wait_for(reading, 30)
        torch.cuda.synchronize(memory.device)
        x = torch.randn(64, 64, device=memory.device)
        torch.testing.assert_close(x @ torch.eye(64, device=x.device), x)
    finally:
        await transport.close()
        owner.stop()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
async def test_processes_that_see_one_gpu_each_read_each_other():
    shape = {"heads": HEADS, "block_size": 64, "num_blocks": NUM_TOKENS // 64}
    owner = Owner(
        [
            start_owner(
                environ={"CUDA_VISIBLE_DEVICES": "0"},
                worker_id=PEER,
                epoch="e1",
                tp_rank=0,
                tp_size=1,
                device_id=0,
                kind="mapped",
                **shape,
            )
        ]
    )
    environ = {"CUDA_VISIBLE_DEVICES": "1"}
    reader = start_script(CHILD, "read", str(HEADS), str(NUM_TOKENS), environ=environ)
    try:
        assert reader.stdout is not None
        nonce = await asyncio.to_thread(_line_of, reader, "nonce ")
        card = await asyncio.to_thread(owner.card, bytes.fromhex(nonce))
        printed, _ = await asyncio.to_thread(reader.communicate, card.hex() + "\n", 60)
        assert printed.splitlines()[-1] == "all tokens arrived", printed
    finally:
        reader.kill()
        reader.communicate()
        owner.stop()


def _line_of(process: Any, prefix: str) -> str:
    for line in process.stdout:
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip()
    raise AssertionError(f"the process ended without a line {prefix!r}")


def test_a_pool_in_expandable_segments_is_refused_with_a_reason():
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    child = start_script(CHILD, "open", str(HEADS), str(NUM_TOKENS), environ=environ)
    printed, _ = child.communicate(timeout=60)
    assert "must not come from expandable segments" in printed, printed
    assert "PYTORCH_CUDA_ALLOC_CONF" in printed
