"""A router and any number of workers as plain processes, with hands on each of them.

The test is the supervisor: it kills, stops, continues and restarts processes by name, and asks
them over gRPC what they still hold.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx

from baton.core.clock import MonotonicClock
from baton.core.tls import TlsFiles
from baton.core.worker_info import Role, WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.rpc.channel import open_channel
from baton.rpc.v1 import inference_pb2, worker_pb2
from baton.rpc.v1.inference_pb2_grpc import InferenceStub
from baton.rpc.v1.worker_pb2_grpc import WorkerStub
from running_system import free_port, is_idle

START_S = 60.0
CALM_S = 10.0
INFO_TIMEOUT_S = 5.0


@dataclass
class Process:
    """One process of the cluster, through all its restarts."""

    name: str
    command: list[str]
    log_file: Path
    role: Role | None = None
    running: subprocess.Popen[bytes] | None = None
    is_paused: bool = False
    is_leaving: bool = False

    def start(self) -> None:
        self.is_paused = self.is_leaving = False
        with self.log_file.open("ab") as log:
            self.running = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def is_alive(self) -> bool:
        return self.running is not None and self.running.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To the worker itself, which may be the child of a command that moved it elsewhere."""
        assert self.running is not None
        os.kill(self.running.pid, number)

    def end(self) -> None:
        if self.running is None:
            return
        self.running.kill()
        self.running.wait(20)
        self.running = None


@dataclass
class Answer:
    """What a client got of one request."""

    token_ids: list[int] = field(default_factory=list)
    is_complete: bool = False
    error: str = ""
    """gRPC code and message of a request that ended otherwise."""
    is_hung: bool = False
    """It did not end within the time the client gave it."""
    seconds: float = 0.0
    longest_pause_s: float = 0.0


class Cluster:
    """Not started until `start`."""

    def __init__(
        self, model: Path, directory: Path, *settings: str, tls: TlsFiles | None = None
    ) -> None:
        """`settings` apply to all workers; with `tls` all processes take its files."""
        self.model = model
        self.directory = directory
        self.http_port, self.grpc_port = free_port(), free_port()
        self.registry = DirectoryRegistry(directory / "registry", clock=MonotonicClock())
        self.workers: dict[str, Process] = {}
        self._tls = tls
        self._settings = settings
        self._router: Process | None = None
        self._channel: grpc.aio.Channel | None = None
        self._ports: dict[str, int] = {}

    # Processes.

    def add(self, role: Role, *settings: str, name: str = "", prefix: Sequence[str] = ()) -> str:
        """Start a worker; returns its name. `prefix`: a command that execs the rest elsewhere."""
        name = name or f"{role.value}-{sum(w.role is role for w in self.workers.values())}"
        command = [
            *prefix,
            *(sys.executable, "-m", f"services.{role.value}", "--model", str(self.model)),
            *("--registry", str(self.directory / "registry"), "--set", f"worker_id={name}"),
            *("--exit-with-parent", str(os.getpid()), "--set", "drain_s=5"),
            *("--set", "engine.dtype=float32", "--set", "engine.num_threads=1"),
            *self._tls_arguments(),
            *(a for setting in (*self._settings, *settings) for a in ("--set", setting)),
        ]
        worker = self.workers[name] = Process(name, command, self._log(name), role)
        worker.start()
        return name

    def start_router(self, *settings: str) -> None:
        settings = (
            f"http_port={self.http_port}",
            f"grpc_port={self.grpc_port}",
            f"model_path={self.model}",
            f"registry_dir={self.directory / 'registry'}",
            "policy.local_prefill_max_tokens=0",
            *settings,
        )
        command = [
            *(sys.executable, "-m", "services.router", "--exit-with-parent", str(os.getpid())),
            *self._tls_arguments(),
            *(a for setting in settings for a in ("--set", setting)),
        ]
        self._router = Process("router", command, self._log("router"))
        self._router.start()

    def _tls_arguments(self) -> list[str]:
        if self._tls is None:
            return []
        files = self._tls.config.files()
        return [a for name, path in files for a in ("--set", f"tls.{name}={path}")]

    @property
    def tls(self) -> TlsFiles | None:
        return self._tls

    async def ready(self, wanted: dict[Role, int] | None = None) -> None:
        """All living workers answer the router: `wanted` by role, or as they were started."""
        if wanted is None:
            living = [w.role for w in self.workers.values() if w.is_alive]
            wanted = {role: living.count(role) for role in Role}
        deadline = time.monotonic() + START_S
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
            while True:
                found = await self._workers_answering(client)
                if found == {role.value: number for role, number in wanted.items()}:
                    return
                self._assert_none_failed()
                assert time.monotonic() < deadline, f"{found}, wanted {wanted}\n{self.logs()}"
                await asyncio.sleep(0.1)

    async def _workers_answering(self, client: httpx.AsyncClient) -> dict[str, int]:
        try:
            answer = (await client.get(f"http://127.0.0.1:{self.http_port}/health")).json()
        except (httpx.HTTPError, ValueError):
            return {}
        detail = answer.get("detail", answer)
        found: dict[str, int] = detail.get("workers_answering", {})
        return found

    def _assert_none_failed(self) -> None:
        for process in [*self.workers.values(), self._router]:
            if process is not None and process.running is not None and not process.is_alive:
                raise AssertionError(f"{process.name} ended by itself\n{self.logs()}")

    def kill(self, name: str) -> None:
        """SIGKILL; nothing is left of the process when this returns."""
        self.workers[name].end()

    def pause(self, name: str) -> None:
        self.workers[name].is_paused = True
        self.workers[name].signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.workers[name].is_paused = False
        self.workers[name].signal(signal.SIGCONT)

    def leave(self, name: str) -> None:
        """SIGTERM: it drains and ends."""
        self.workers[name].is_leaving = True
        self.workers[name].signal(signal.SIGTERM)

    async def ended(self, name: str, timeout_s: float) -> int:
        """The exit status of a worker that was told to leave."""
        running = self.workers[name].running
        assert running is not None
        code = await asyncio.to_thread(running.wait, timeout_s)
        self.workers[name].running = None
        return code

    def restart(self, name: str) -> None:
        """Start a killed worker again, under its old name."""
        assert not self.workers[name].is_alive
        self.workers[name].start()

    @property
    def router_pid(self) -> int:
        assert self._router is not None and self._router.running is not None
        return self._router.running.pid

    async def stop(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        for process in [*self.workers.values(), self._router]:
            if process is not None:
                process.end()

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def logs(self) -> str:
        files = sorted(self.directory.glob("*.log"))
        return "\n".join(f"--- {f.name}\n{f.read_text()[-4000:]}" for f in files)

    def log_lines(self, name: str) -> list[dict[str, object]]:
        """The process's own lines; libraries write others."""
        lines = self._log(name).read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    # What they hold.

    async def info(self, name: str, *, check_integrity: bool = False) -> worker_pb2.Welcome:
        """What a living worker says of itself."""
        found: WorkerInfo | None = None
        worker = self.workers[name]
        assert worker.running is not None
        for info in (await self.registry.list()).values():
            if info.worker_id == name and info.pid == worker.running.pid:
                found = info
        if found is None:
            raise LookupError(f"{name} is not registered")
        async with open_channel(found.address, self._tls) as channel:
            request = worker_pb2.GetInfoRequest(check_integrity=check_integrity)
            return await WorkerStub(channel).GetInfo(request, timeout=INFO_TIMEOUT_S)

    async def calm(self, timeout_s: float = CALM_S) -> None:
        """All living workers hold nothing and their books add up, at the latest `timeout_s` from
        now. One that was told to leave has done so."""
        deadline = time.monotonic() + timeout_s
        names = [n for n, w in self.workers.items() if w.is_alive and not w.is_paused]
        state: dict[str, object] = {}
        while names:
            for name in list(names):
                worker = self.workers[name]
                if worker.is_leaving and not worker.is_alive:
                    assert worker.running is not None and worker.running.returncode == 0
                    names.remove(name)
                    continue
                try:
                    welcome = await self.info(name, check_integrity=True)
                except (LookupError, grpc.aio.AioRpcError) as error:
                    state[name] = error
                    continue
                state[name] = welcome.load
                if is_idle(welcome.load):
                    names.remove(name)
            late = time.monotonic() > deadline
            assert not (names and late), f"{ {n: state[n] for n in names} }\n{self.logs()}"
            await asyncio.sleep(0.1)

    async def total(self, series: str) -> float:
        """Sum over all labels of a series of the router's metrics."""
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            text = (await client.get(f"http://127.0.0.1:{self.http_port}/metrics")).text
        lines = [line for line in text.splitlines() if line.partition("{")[0] == series]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    # Requests.

    async def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        timeout_s: float = 60.0,
        cancel_after_s: float | None = None,
        started: asyncio.Event | None = None,
        num_tokens_before_start: int = 1,
    ) -> Answer:
        """Greedy, to `max_tokens`. `started` is set after so many tokens have come."""
        request = inference_pb2.CompletionRequest(
            model=self.model.name,
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=worker_pb2.SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True
            ),
        )
        if self._channel is None:
            self._channel = open_channel(f"127.0.0.1:{self.grpc_port}")
        answer = Answer()
        began_s = last_s = time.monotonic()
        call = InferenceStub(self._channel).Generate(request, timeout=timeout_s)
        if cancel_after_s is not None:
            asyncio.get_running_loop().call_later(cancel_after_s, call.cancel)
        try:
            async for delta in call:
                now_s = time.monotonic()
                answer.longest_pause_s = max(answer.longest_pause_s, now_s - last_s)
                last_s = now_s
                answer.token_ids += delta.token_ids
                if started is not None and len(answer.token_ids) >= num_tokens_before_start:
                    started.set()
            answer.is_complete = len(answer.token_ids) == max_tokens
        except grpc.aio.AioRpcError as error:
            answer.error = f"{error.code().name}: {error.details()}"
            answer.is_hung = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            answer.error = "CANCELLED"
        answer.seconds = time.monotonic() - began_s
        return answer
