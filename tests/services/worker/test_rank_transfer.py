"""Workers whose ranks have a pool each hand KV over: the tokens are those of one worker alone.

Rank 0 of every worker runs here, the other ranks in processes of their own; blocks move by the
transports that serve requests. The events are the engine's; leases and streams are left out.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import pytest_asyncio

from baton.core.block import BlockHash, BlockId, chain_hashes
from baton.core.clock import ManualClock
from baton.core.errors import ConfigError, PeerGone, TransferError
from baton.core.kv_layout import KvLayout
from baton.core.request import GenerateRequest, PeerRef, RequestId, SamplingParams, Work
from baton.core.worker_info import Epoch, Role, WorkerId
from baton.engine.config import Device, EngineConfig
from baton.engine.factory import build_engine
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel.rank_service import RankKv
from kvtransfer import cuda_driver
from kvtransfer.metadata import PeerIdentity
from kvtransfer.nixl_library import is_installed
from kvtransfer.select import TransportKind
from services.worker.backend import open_backend
from services.worker.config import TransferConfig, WorkerConfig
from services.worker.kv_transport import (
    RankTransfer,
    RankTransferSettings,
    join_ranks,
    rank_service,
    region_of,
)
from tiny_llama import write_checkpoint

SECRET = b"a secret of the whole cluster"
PROMPTS = [[(7 * i + 31 * k) % 256 for i in range(n)] for k, n in enumerate((90, 33, 16))]
MAX_TOKENS = 12
ROOT = BlockHash(bytes(16))
SOURCE = PeerRef(WorkerId("p"), Epoch("e"), "127.0.0.1:1")

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.nixl,
    pytest.mark.skipif(not is_installed(), reason="NIXL is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_key_value_heads=4)


@dataclass
class Worker:
    backend: Any
    """A `Backend`, or something with an engine."""
    block_size: int
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def submit(self, work: Work) -> None:
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS):
            hashes = tuple(chain_hashes(ROOT, prompt, self.block_size))
            request = GenerateRequest(
                RequestId(f"r{i}"),
                work,
                tuple(prompt),
                sampling,
                block_hashes=hashes,
                kv_source=SOURCE if work is Work.DECODE else None,
            )
            self.backend.engine.submit(request)

    def step(self):
        output = self.backend.engine.step()
        for delta in output.deltas:
            assert not delta.error
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        return output

    def run(self) -> dict[str, list[int]]:
        while self.backend.engine.has_work:
            self.step()
        return self.tokens

    @property
    def rank_pids(self) -> list[int]:
        return [] if self.backend.ranks is None else self.backend.ranks.pids


@dataclass
class Workers:
    folder: Path
    opened: dict[str, Worker] = field(default_factory=dict)

    async def open(
        self, name: str, *, tp_size: int = 1, transport: str = "auto", block_size: int = 16
    ) -> Worker:
        engine = EngineConfig(
            model_path=self.folder,
            dtype="float32",
            tp_size=tp_size,
            pool_per_rank=True,
            block_size=block_size,
            kv_cache_bytes=1 << 19,
            num_threads=1,
            max_num_batched_tokens=48,
            # Every block is to be read, also the second time a prompt comes.
            enable_prefix_caching=False,
        )
        config = WorkerConfig(
            engine, Role.DECODE, transfer=TransferConfig(transport=TransportKind(transport))
        )
        identity = PeerIdentity(WorkerId(name), Epoch(secrets.token_hex(4)))
        backend = await open_backend(config, identity, SECRET)
        self.opened[name] = Worker(backend, block_size)
        return self.opened[name]

    async def close(self) -> None:
        pids = [pid for worker in self.opened.values() for pid in worker.rank_pids]
        for worker in self.opened.values():
            await worker.backend.transport.close()
            if worker.backend.ranks is not None:
                await asyncio.to_thread(worker.backend.ranks.close)
        assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(folder: Path) -> AsyncIterator[Workers]:
    """Owners offer every transport; a reader has the one of its name."""
    workers = Workers(folder)
    try:
        await workers.open("1 rank")
        await workers.open("2 ranks", tp_size=2)
        await workers.open("2 ranks, blocks of 32", tp_size=2, block_size=32)
        for transport in ("nixl", "shm", "socket"):
            await workers.open(f"{transport}, 1 rank", transport=transport)
        await workers.open("nixl, 2 ranks", tp_size=2, transport="nixl")
        await workers.open("shm, 2 ranks, blocks of 8", tp_size=2, transport="shm", block_size=8)
        yield workers
    finally:
        await workers.close()


@pytest_asyncio.fixture(loop_scope="module")
async def few(folder: Path) -> AsyncIterator[Workers]:
    """For tests that lose some."""
    workers = Workers(folder)
    try:
        yield workers
    finally:
        await workers.close()


async def connect(reader: Worker, owner: Worker) -> WorkerId:
    nonce = secrets.token_bytes(16)
    card = owner.backend.transport.card(nonce)
    peer, _ = await reader.backend.transport.connect(card, nonce=nonce)
    return peer


def units(block_ids: list[BlockId], per_block: int) -> list[BlockId]:
    return [BlockId(b * per_block + i) for b in block_ids for i in range(per_block)]


async def hand_over(prefill: Worker, decode: Worker) -> dict[str, list[int]]:
    """Every prompt through both: each chunk is read when it is announced."""
    peer = await connect(decode, prefill)
    transport = decode.backend.transport
    there, here = transport.units_per_block(peer)
    prefill.tokens.clear()
    decode.tokens.clear()
    prefill.submit(Work.PREFILL)
    decode.submit(Work.DECODE)
    targets: dict[str, list[BlockId]] = {}
    engines = prefill.backend.engine, decode.backend.engine
    while engines[0].has_work or engines[1].has_work:
        for reservation in decode.step().reservations:
            targets[reservation.request_id] = units(list(reservation.block_ids), here)
        for chunk in prefill.step().chunks:
            sources = units(list(chunk.block_ids), there)
            own = targets[chunk.request_id][chunk.first_block_index * there :][: len(sources)]
            stats = await transport.read(peer, sources[: len(own)], own, timeout_s=10.0)
            assert stats.num_bytes > 0
            if chunk.is_last:
                decode.tokens[chunk.request_id] = list(prefill.tokens[chunk.request_id])
                engines[1].activate(chunk.request_id, chunk.first_token)
                engines[0].release_lease(chunk.request_id)
    for engine in engines:
        engine.check_integrity()
        assert engine.is_empty
    assert transport.settled() == []
    return decode.tokens


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """What a worker answers that computes everything by itself."""
    config = EngineConfig(model_path=folder, dtype="float32", kv_cache_bytes=1 << 20, num_threads=1)
    engine = build_engine(config, clock=ManualClock()).engine
    alone = Worker(SimpleNamespace(engine=engine), block_size=16)
    alone.submit(Work.GENERATE)
    tokens = alone.run()
    assert len({tuple(t) for t in tokens.values()}) == len(PROMPTS)
    return tokens


@pytest.mark.parametrize(
    ("owner", "reader"),
    [
        ("2 ranks", "nixl, 1 rank"),
        ("2 ranks", "shm, 1 rank"),
        ("2 ranks", "socket, 1 rank"),
        ("1 rank", "nixl, 2 ranks"),
        ("2 ranks", "nixl, 2 ranks"),
        ("1 rank", "shm, 2 ranks, blocks of 8"),
        ("2 ranks", "shm, 2 ranks, blocks of 8"),
        ("2 ranks, blocks of 32", "nixl, 1 rank"),
        ("2 ranks, blocks of 32", "shm, 2 ranks, blocks of 8"),
    ],
)
async def test_tokens_are_those_of_one_worker_alone(workers, expected, owner, reader):
    prefill, decode = workers.opened[owner], workers.opened[reader]
    assert await hand_over(prefill, decode) == expected
    link = decode.backend.transport.link(WorkerId(owner))
    assert link is not None
    assert (link.peer_id, link.transport) == (owner, reader.split(",")[0])
    assert link.bytes_per_second > 0


async def test_the_link_is_timed_on_all_ranks(workers):
    decode = workers.opened["nixl, 2 ranks"]
    peer = await connect(decode, workers.opened["2 ranks"])
    report = await decode.backend.transport.measure(peer, num_rounds=1, timeout_s=5.0)
    assert report.bytes_per_second > 0


async def test_a_lost_rank_of_the_owner_fails_reads_of_its_heads(few):
    prefill = await few.open("p", tp_size=2)
    decode = await few.open("d")
    peer = await connect(decode, prefill)
    (rank,) = prefill.rank_pids
    os.kill(rank, signal.SIGKILL)
    await asyncio.to_thread(psutil.Process(rank).wait, 10)
    with pytest.raises(PeerGone):
        await decode.backend.transport.read(peer, [BlockId(1)], [BlockId(1)], timeout_s=5.0)
    assert decode.backend.transport.settled() == []


async def test_a_lost_rank_of_the_reader_fails_its_reads_and_its_worker(few):
    prefill = await few.open("p")
    decode = await few.open("d", tp_size=2)
    peer = await connect(decode, prefill)
    (rank,) = decode.rank_pids
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(TransferError):
        while True:
            await decode.backend.transport.read(peer, [BlockId(1)], [BlockId(1)], timeout_s=5.0)
    async with asyncio.timeout(10):
        while decode.backend.ranks.failure is None:
            await asyncio.sleep(0.01)
    assert "rank 1 of 2" in decode.backend.ranks.failure.reason


def gpu_settings(folder: Path, transport: str) -> RankTransferSettings:
    engine = EngineConfig(model_path=folder, device=Device.CUDA, tp_size=2)
    config = WorkerConfig(
        engine, Role.DECODE, transfer=TransferConfig(transport=TransportKind(transport))
    )
    return RankTransferSettings(config, PeerIdentity(WorkerId("d"), Epoch("e")), SECRET)


def gpu_kv(rank: int) -> RankKv:
    layout = KvLayout("m", 2, 4, 8, 16, "bfloat16")
    num_bytes = 10 * layout.block_bytes // 2
    return RankKv(layout, Parallel(rank, 2), 8, 2, 1 << 40, num_bytes, device_id=0)


async def test_ranks_on_gpus_that_nothing_reads_serve_alone_unless_a_transport_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno-such-driver.so.1")
    for transport, is_lost in (("auto", False), ("mapped", True), ("nixl", True)):
        settings = gpu_settings(tmp_path, transport)
        assert rank_service(settings) is not None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            rank = RankTransfer(settings, theirs)
            if is_lost:
                with pytest.raises(TransferError, match=r"libno-such-driver.so.1"):
                    rank.start(gpu_kv(1))
                continue
            rank.start(gpu_kv(1))
            own = MoverTransportStub()
            with pytest.raises(TransferError, match="rank 1 of this worker has no KV transport"):
                await join_ranks(own, [ours.dup()], region_of(gpu_kv(0)), SECRET)
            assert own.is_closed
    with pytest.raises(ConfigError, match="transport shm does not move KV in GPU memory"):
        RankTransfer(gpu_settings(tmp_path, "shm"), ours).start(gpu_kv(1))


class MoverTransportStub:
    """Only ever closed."""

    num_recycles = 0
    is_closed = False

    async def close(self) -> None:
        self.is_closed = True


async def test_a_rank_without_settings_is_a_configuration_error():
    with pytest.raises(ConfigError, match="a rank's transfer needs its settings, got int"):
        RankTransfer(3, None)  # type: ignore[arg-type]
