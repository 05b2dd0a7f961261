"""Whole workers with an arithmetic model: real engine, real gRPC, real shared-memory transport.

The runner keeps its KV fingerprints in the pool's memory, so a block that is read too early, from
the wrong place or written too late shows as a wrong token.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from baton.core.block import BlockHash, chain_hashes, root_hash
from baton.core.clock import WallClock
from baton.core.fabric import FabricReport, LinkReport
from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import EngineUse
from baton.core.request import (
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.tls import TlsConfig, open_tls
from baton.core.worker_info import PROTOCOL_VERSION, LoadReport, Role, WorkerInfo
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.tensor_parallel.group import RankGroup
from baton.rpc.channel import open_channel
from baton.rpc.convert import (
    delta_from_wire,
    engine_use_from_wire,
    fabric_from_wire,
    load_from_wire,
    peer_to_wire,
    request_to_wire,
    split_hashes,
    worker_info_from_wire,
)
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1.worker_pb2_grpc import WorkerStub
from kvtransfer.metadata import PeerIdentity
from kvtransfer.select import TransportKind, create_transport
from kvtransfer.shm_transport import ShmPool
from kvtransfer.tiers.config import TierConfig
from kvtransfer.transport import PoolRegion
from services.worker.backend import Backend
from services.worker.config import (
    HealthConfig,
    RegistryConfig,
    SessionConfig,
    TransferConfig,
    WorkerConfig,
)
from services.worker.worker import WorkerServer

BLOCK_SIZE = 4
NUM_SCRATCH_BLOCKS = 4
VOCAB_SIZE = 97
SECRET = "0123456789abcdef"
WAIT_S = 10.0


def _load_fake_runner() -> ModuleType:
    name = "worker_test_fake_runner"
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "engine" / "fake_runner.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


fake = _load_fake_runner()


class PoolRunner(fake.FakeRunner):
    """The arithmetic runner with its slots in the pool that peers read; 8 bytes a token."""

    def __init__(self, memory: memoryview, block_size: int, max_in_flight: int) -> None:
        super().__init__(0, block_size, VOCAB_SIZE, max_in_flight=max_in_flight)
        self.slots = memory.cast("q")
        self.step_s = 0.0
        self.in_the_middle: Callable[[], None] = lambda: None
        """Called on the engine's thread after the layer that there is, before its step ends."""

    def launch(self, batch: Any) -> Any:
        if self.step_s:
            # On the engine's thread; a step of a real model takes this long.
            time.sleep(self.step_s)
        step = super().launch(batch)
        if batch.layer_marks is not None:
            for slot, value in step.values.items():
                self.slots[slot] = value
            batch.layer_marks.pass_layers(1)
            self.in_the_middle()
        return step


def layout_of(model_id: str = "m") -> KvLayout:
    """8 bytes of KV per token."""
    return KvLayout(model_id, 1, 1, 1, BLOCK_SIZE, "float32")


@dataclass
class Message:
    """One StepBatch."""

    deltas: list[TokenDelta]
    load: LoadReport | None
    first_kv_sequence: int
    events: list[tuple[list[BlockHash], list[BlockHash]]]
    """What came to the prefix cache and what left it, for a tier or altogether."""


@dataclass
class Router:
    """A router's end of one session, with everything it was told."""

    call: Any
    info: WorkerInfo | None = None
    welcome: pb.Welcome | None = None
    deltas: dict[str, list[TokenDelta]] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    hashes: set[BlockHash] = field(default_factory=set)
    kv_sequence: int = 0
    load: LoadReport | None = None
    fabric: FabricReport | None = None
    num_fabrics: int = 0
    late_uses: dict[str, EngineUse] = field(default_factory=dict)
    """Each at most once, and only after the last delta."""
    names: set[str] = field(default_factory=set)
    """For the test: requests it submitted here."""
    _reader: asyncio.Task[None] | None = None
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def open(self) -> None:
        first = await asyncio.wait_for(self.call.read(), WAIT_S)
        assert first is not grpc.aio.EOF, await self.call.details()
        self.welcome = first.welcome
        self.info = worker_info_from_wire(first.welcome.info)
        self.load = load_from_wire(first.welcome.load)
        self.kv_sequence = first.welcome.kv_sequence
        self.hashes = set(split_hashes(first.welcome.cached_hashes))
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while (message := await self.call.read()) is not grpc.aio.EOF:
                if message.HasField("fabric"):
                    self.fabric = fabric_from_wire(message.fabric)
                    self.num_fabrics += 1
                elif message.HasField("info"):
                    self.info = worker_info_from_wire(message.info)
                else:
                    self._take(message.step)

    def _take(self, step: pb.StepBatch) -> None:
        deltas = [delta_from_wire(delta) for delta in step.deltas]
        for delta in deltas:
            self.deltas.setdefault(delta.request_id, []).append(delta)
        for late in step.late_uses:
            assert self.ends(late.request_id) and late.request_id not in self.late_uses
            self.late_uses[late.request_id] = engine_use_from_wire(late.use)
        if step.HasField("load"):
            self.load = load_from_wire(step.load)
        events = [
            (split_hashes(e.stored), split_hashes(e.removed + e.on_host + e.on_disk))
            for e in step.kv_events
        ]
        if events:
            assert step.first_kv_sequence == self.kv_sequence + 1, "gap in KV events"
            self.kv_sequence += len(events)
        for stored, removed in events:
            self.hashes = (self.hashes - set(removed)) | set(stored)
        self.messages.append(Message(deltas, self.load, step.first_kv_sequence, events))

    async def submit(self, request: GenerateRequest) -> None:
        await self.submit_wire(request_to_wire(request))

    async def submit_wire(self, message: pb.Submit) -> None:
        await self._write(pb.RouterMessage(submit=message))

    async def cancel(self, request_id: str) -> None:
        cancel = pb.Cancel(request_id=request_id, reason="test")
        await self._write(pb.RouterMessage(cancel=cancel))

    async def tell_peers(self, *peers: PeerRef) -> None:
        await self._write(pb.RouterMessage(peers=pb.Peers(peers=map(peer_to_wire, peers))))

    def link(self, peer_id: str) -> LinkReport | None:
        """What the worker said of a peer last."""
        links = self.fabric.links if self.fabric is not None else ()
        return next((link for link in links if link.peer_id == peer_id), None)

    async def _write(self, message: pb.RouterMessage) -> None:
        async with self._writing:
            await self.call.write(message)

    def tokens(self, request_id: str) -> list[int]:
        """In order; asserts that every position comes exactly once."""
        tokens: list[int] = []
        deltas = [d for d in self.deltas.get(request_id, []) if d.token_ids]
        for delta in deltas:
            assert delta.first_index == deltas[0].first_index + len(tokens)
            tokens += delta.token_ids
        return tokens

    def ends(self, request_id: str) -> list[TokenDelta]:
        deltas = self.deltas.get(request_id, [])
        return [d for d in deltas if d.finish_reason is not None or d.timeline is not None]

    async def ended(self, request_id: str, timeout_s: float = WAIT_S) -> TokenDelta:
        """The last delta; there is exactly one."""
        await eventually(lambda: bool(self.ends(request_id)), timeout_s)
        (end,) = self.ends(request_id)
        return end

    async def close(self) -> None:
        self.call.cancel()
        if self._reader is not None:
            await self._reader


@dataclass
class Worker:
    """A started WorkerServer with its insides at hand."""

    server: WorkerServer
    engine: Engine
    runner: PoolRunner
    channel: Any
    stub: WorkerStub
    routers: list[Router] = field(default_factory=list)

    @property
    def info(self) -> WorkerInfo:
        return self.server.info

    @property
    def peer(self) -> PeerRef:
        return PeerRef(self.info.worker_id, self.info.epoch, self.info.address)

    async def router(self, name: str = "router", version: int = PROTOCOL_VERSION) -> Router:
        call = self.stub.Session()
        hello = pb.Hello(router_id=name, protocol_version=version)
        await call.write(pb.RouterMessage(hello=hello))
        router = Router(call)
        self.routers.append(router)
        await router.open()
        return router

    async def is_idle(self) -> bool:
        """Every block is free or cached; the tiers may lease some again a moment later."""
        parts = self.server.parts
        snapshot = await parts.engine.snapshot()
        load = snapshot.load
        return (
            snapshot.is_empty
            and parts.requests.num_live == 0
            and parts.leases.num_leases == 0
            and parts.reads.is_empty
            and parts.imports.is_empty
            and load.quarantined_blocks == 0
            and load.free_blocks + load.cached_blocks == load.total_blocks
        )

    async def _state(self) -> str:
        parts = self.server.parts
        snapshot = await parts.engine.snapshot()
        return (
            f"{snapshot.load}, live {parts.requests.num_live}, leases {parts.leases.num_leases}, "
            f"reads empty {parts.reads.is_empty}, imports empty {parts.imports.is_empty}"
        )

    async def assert_nothing_leaked(self, timeout_s: float = WAIT_S) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.is_idle():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not idle after {timeout_s} s: {await self._state()}") from None
        await self.server.parts.engine.check_integrity()
        load = (await self.server.parts.engine.snapshot()).load
        assert (load.leases, load.reservations, load.num_running, load.num_waiting) == (0,) * 4
        assert not self.runner.violations, self.runner.violations[0]

    async def close(self) -> None:
        for router in self.routers:
            await router.close()
        await self.channel.close()
        await self.server.stop(drain_s=0)


async def eventually(claim: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not claim():
            await asyncio.sleep(0.005)


class Workers:
    """Starts workers in this process and ends all of them."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry
        self._workers: list[Worker] = []
        self._names = itertools.count()

    async def start(
        self,
        role: Role = Role.DECODE,
        *,
        num_blocks: int = 64,
        model_id: str = "m",
        secret: str = SECRET,
        lease_s: float = 15.0,
        session: SessionConfig | None = None,
        registry: bool = False,
        name: str | None = None,
        transfer: dict[str, Any] | None = None,
        tiers: TierConfig | None = None,
        step_s: float = 0.0,
        max_in_flight: int = 1,
        port: int = 0,
        ranks: RankGroup | None = None,
        tls: TlsConfig | None = None,
        other: dict[str, Any] | None = None,
        fixed_role: str = "",
        **engine: Any,
    ) -> Worker:
        """`other`: engine settings of the other pool where they differ from this worker's."""
        engine = {"max_num_seqs": 4, "max_num_batched_tokens": 16, **engine}
        own = EngineConfig(model_path=Path("/m/arithmetic"), block_size=BLOCK_SIZE, **engine)
        config = WorkerConfig(
            engine=own,
            other_engine=dataclasses.replace(own, **(other or {})),
            role=role,
            port=port,
            worker_id=name or f"{role.value}-{next(self._names)}",
            transfer=TransferConfig(
                cluster_secret=secret,
                lease_s=lease_s,
                connect_timeout_s=2.0,
                read_timeout_s=2.0,
                **(transfer or {}),
            ),
            tiers=tiers or TierConfig(),
            registry=RegistryConfig(directory=self.registry if registry else None, ttl_s=2.0),
            session=session or SessionConfig(load_period_s=0.2),
            health=HealthConfig(period_s=0.2, step_timeout_s=2.0, ping_timeout_s=1.0),
            tls=tls or TlsConfig(),
        )
        built: list[tuple[Engine, PoolRunner]] = []

        async def open_backend(
            config: WorkerConfig, identity: PeerIdentity, secret: bytes
        ) -> Backend:
            layout = layout_of(model_id)
            num_allocated = num_blocks + NUM_SCRATCH_BLOCKS
            pool = ShmPool.create(num_allocated * layout.block_bytes)
            runner = PoolRunner(pool.memory, BLOCK_SIZE, max_in_flight)
            runner.step_s = step_s
            runner_engine = Engine(
                config=config.engine,
                layout=layout,
                num_blocks=num_blocks,
                max_model_len=4096,
                runner=runner,
                clock=WallClock(),
                vocab_size=VOCAB_SIZE,
            )
            built.append((runner_engine, runner))
            region = PoolRegion(
                pool.address,
                pool.num_bytes,
                num_allocated,
                layout,
                num_scratch_blocks=NUM_SCRATCH_BLOCKS,
            )
            transport = create_transport(
                TransportKind.SHM, region, identity, secret, shared_pool=pool
            )
            return Backend(
                runner_engine,
                layout,
                num_blocks,
                runner_engine.max_num_tokens,
                transport,
                ranks=ranks,
                region=region,
            )

        server = WorkerServer(config, open_backend=open_backend, fixed_role=fixed_role)
        info = await server.start()
        channel = open_channel(info.address, open_tls(config.tls))
        worker = Worker(server, *built[0], channel, WorkerStub(channel))
        self._workers.append(worker)
        return worker

    async def stop(self) -> None:
        for worker in self._workers:
            await worker.close()


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    workers = Workers(tmp_path / "registry")
    yield workers
    await workers.stop()


def _make_request(
    request_id: str,
    prompt: Any,
    *,
    work: Work = Work.GENERATE,
    peer: PeerRef | None = None,
    deadline_s: float = 60.0,
    output_token_ids: tuple[int, ...] = (),
    eos_token_ids: tuple[int, ...] = (),
    is_cached: bool = True,
    **sampling: Any,
) -> GenerateRequest:
    root = root_hash(layout_of().fingerprint)
    return GenerateRequest(
        request_id=RequestId(request_id),
        work=work,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0.0, **sampling),
        block_hashes=tuple(chain_hashes(root, prompt, BLOCK_SIZE)) if is_cached else (),
        output_token_ids=output_token_ids,
        eos_token_ids=eos_token_ids,
        kv_source=peer,
        deadline_s=deadline_s,
    )


@pytest.fixture(scope="session")
def make_request() -> Callable[..., GenerateRequest]:
    return _make_request


@pytest.fixture(scope="session")
def expected() -> Callable[..., list[int]]:
    """(prompt, num_tokens, stop_ids=()) -> the right output."""

    def output(prompt: Any, num_tokens: int, stop_ids: Any = ()) -> list[int]:
        return fake.expected_output(prompt, num_tokens, VOCAB_SIZE, stop_ids)

    return output


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Waits until a claim holds, for a bounded time."""
    return eventually
