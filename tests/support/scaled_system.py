"""A system of plain processes with a tiny model, whose pools a test changes as it likes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import psutil

from baton.core.worker_info import Role
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from greedy_stream import stream_text
from running_system import free_port, is_idle
from services.launch.autoscale_config import LiveConfig
from services.launch.autoscaling import pools_of
from services.launch.background import BackgroundLoop
from services.launch.config import SystemConfig
from services.launch.process_pools import ProcessPools
from services.launch.processes import start_system
from services.launch.readiness import wait_until_healthy
from services.launch.run_directory import RunDirectory
from services.launch.supervisor import Supervisor
from services.planner.actuator import PlannedWorker, WorkerPhase
from tiny_llama import write_checkpoint, write_pair_tokenizer

WAIT_S = 60.0
ENGINE = {"engine": {"dtype": "float32"}}


@dataclass
class ScaledSystem:
    """Everything is done on the test's own thread, beside the jobs of the pools."""

    system: SystemConfig
    supervisor: Supervisor
    pools: ProcessPools
    pids: set[int] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.system.http_port}"

    def workers(self) -> dict[str, PlannedWorker]:
        self.supervisor.poll()
        self.pids |= {child.pid for child in self.supervisor.all() if child.pid is not None}
        return {worker.name: worker for worker in self.pools.workers()}

    def ready(self) -> dict[str, Role]:
        found = self.workers().values()
        return {w.name: w.role for w in found if w.phase is WorkerPhase.READY}

    async def wait_for(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_there():
            assert time.monotonic() < deadline, f"not in time; there is {self.workers()}"
            await asyncio.sleep(0.05)

    async def loads(self) -> dict[str, worker_pb2.LoadReport]:
        """Of all workers that answer, by name."""
        found = {}
        for entry in self.pools.registry.entries():
            async with grpc.aio.insecure_channel(entry.info.address) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                # One that drains may be gone by now.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=10)
                    found[str(entry.info.worker_id)] = answer.load
        return found

    async def stream(self, prompt: list[int], num_tokens: int) -> str:
        return await stream_text(self.url, prompt, num_tokens)

    async def metric(self, start: str) -> float:
        """The sum of all samples whose lines start so."""
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"{self.url}/metrics")).text
        lines = (line for line in text.splitlines() if line.startswith(start))
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def assert_nothing_leaked(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not all(map(is_idle, (loads := await self.loads()).values())):
            assert time.monotonic() < deadline, f"leaked: {loads}"
            await asyncio.sleep(0.2)


@contextmanager
def scaled_system(folder: Path) -> Iterator[ScaledSystem]:
    """One prefill and one decode worker to begin with; every prompt goes through both."""
    model = folder / "tiny"
    write_checkpoint(model, max_position_embeddings=8192)
    write_pair_tokenizer(model)
    system = SystemConfig(
        model, http_port=free_port(), grpc_port=free_port(), prefill=ENGINE, decode=ENGINE,
        router={"policy": {"local_prefill_max_tokens": 0}},
    )  # fmt: skip
    run = RunDirectory.create(folder / "run")
    jobs = BackgroundLoop("jobs")
    supervisor = start_system(system, run)
    try:
        scaled = ScaledSystem(system, supervisor, pools_of(supervisor, system, run, LIVE, jobs))

        def still_running() -> str | None:
            supervisor.poll()
            return supervisor.hopeless()

        wait_until_healthy(scaled.url, timeout_s=WAIT_S, still_running=still_running)
        jobs.start()
        yield scaled
    finally:
        jobs.stop(5)
        supervisor.stop(grace_s=8)
    left = [pid for pid in scaled.pids if psutil.pid_exists(pid)]
    assert left == []


LIVE = LiveConfig(drain_s=120.0, start_timeout_s=WAIT_S)
