"""The routers under measurement, each over two prefill and two decode workers that compute nothing.

Ours runs as `python -m services.router` over the session protocol; the others are started from
Python environments of their own, given on the command line, over the same made-up workers behind
HTTP. All processes are children of the benchmark, on loopback.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
NUM_EACH = 2
_NO_HUB = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}


@dataclass(frozen=True, slots=True)
class Contender:
    """A running router."""

    name: str
    address: str
    """host:port of its HTTP door."""
    process: psutil.Process
    model: str

    def cpu_s(self) -> float:
        """Processor seconds of the router and its children so far."""
        times = [p.cpu_times() for p in (self.process, *self.process.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    def rss_bytes(self) -> int:
        processes = (self.process, *self.process.children(recursive=True))
        return sum(p.memory_info().rss for p in processes)


@dataclass(frozen=True, slots=True)
class Workers:
    """Addresses of fake workers, host:port."""

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    capped: tuple[str, ...] = ()
    """HTTP prefill workers that answer one token whatever is asked."""


class Children:
    """Starts processes and ends them all."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[str]] = []

    def start(
        self, command: list[str], environ: Mapping[str, str], log: Path | None = None
    ) -> subprocess.Popen[str]:
        out = subprocess.PIPE if log is None else log.open("w")
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT if log else None,
            text=True, env=dict(environ),
        )  # fmt: skip
        self._children.append(child)
        return child

    def ready_address(self, child: subprocess.Popen[str]) -> str:
        """From the line `ready HOST:PORT`. Raises RuntimeError."""
        assert child.stdout is not None
        readable, _, _ = select.select([child.stdout], [], [], READY_TIMEOUT_S)
        line = child.stdout.readline() if readable else ""
        if not line.startswith("ready "):
            raise RuntimeError(f"a fake worker did not start: {line!r}")
        return line.split()[1]

    def close(self) -> None:
        for child in self._children:
            child.terminate()
        for child in self._children:
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def session_workers(children: Children, model: str, step_ms: float) -> Workers:
    """Fake workers that speak the session protocol."""

    def start(role: str) -> str:
        command = [sys.executable, "-m", "bench.router.fake_worker", "--role", role]
        command += ["--layout-model", model, "--step-ms", str(step_ms)]
        return children.ready_address(children.start(command, os.environ))

    return Workers(
        tuple(start("prefill") for _ in range(NUM_EACH)),
        tuple(start("decode") for _ in range(NUM_EACH)),
    )


def http_workers(children: Children, model: str, step_ms: float) -> Workers:
    """Fake workers behind HTTP."""

    def start(cap: int) -> str:
        command = [sys.executable, "-m", "bench.router.fake_http", "--model", model]
        command += ["--step-ms", str(step_ms), "--max-tokens-cap", str(cap)]
        return children.ready_address(children.start(command, os.environ))

    decode = tuple(start(1 << 30) for _ in range(NUM_EACH))
    return Workers((), decode, tuple(start(1) for _ in range(NUM_EACH)))


def ours(
    children: Children, workers: Workers, model_path: Path, log: Path, *settings: str
) -> Contender:
    """`python -m services.router` on its defaults but for `settings`."""
    port = free_port()
    command = [sys.executable, "-m", "services.router"]
    for setting in (
        f"model_path={model_path}",
        f"http_port={port}",
        "grpc_port=0",
        f"workers={','.join((*workers.prefill, *workers.decode))}",
        *settings,
    ):
        command += ["--set", setting]
    child = children.start(command, os.environ, log)
    address = f"127.0.0.1:{port}"
    _wait_until_up(child, f"http://{address}/health", log)
    return Contender("baton", address, psutil.Process(child.pid), model_path.resolve().name)


def sglang_router(
    children: Children, python: Path, workers: Workers, model: str, log: Path, *, is_pd: bool
) -> Contender:
    options = ["--pd-disaggregation"]
    for address in workers.capped:
        options += ["--prefill", f"http://{address}", "8998"]
    pd_options = options if is_pd else None
    return _peer(children, python, "sglang", workers, model, log, pd_options)


def vllm_router(
    children: Children, python: Path, workers: Workers, model: str, log: Path, *, is_pd: bool
) -> Contender:
    options = ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
    for address in workers.capped:
        options += ["--prefill", f"http://{address}"]
    pd_options = options if is_pd else None
    return _peer(children, python, "vllm", workers, model, log, pd_options)


def dynamo_frontend(
    children: Children, python: Path, model_path: Path, log: Path, *, step_ms: float
) -> Contender:
    """Dynamo's HTTP frontend in KV-aware mode over workers of its own protocol. Like ours it
    tokenizes and detokenizes. Raises RuntimeError when its workers do not register."""
    port, name = free_port(), model_path.resolve().name
    found_in = tempfile.mkdtemp(dir=log.parent)
    environ = {
        **_NO_HUB,
        "DYN_FILE_KV": found_in,
        "DYN_LOG": "error",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_EVENT_PLANE_HOST": "127.0.0.1",
    }
    worker = Path(__file__).with_name("dynamo_worker.py")
    for number in range(NUM_EACH):
        command = [str(python), str(worker), "--model", str(model_path), "--name", name]
        command += ["--step-ms", str(step_ms)]
        children.start(command, environ, log.with_suffix(f".worker{number}"))
    command = [str(python), "-m", "dynamo.frontend", "--http-host", "127.0.0.1"]
    command += ["--http-port", str(port), "--discovery-backend", "file", "--router-mode", "kv"]
    child = children.start(command, environ, log)
    url = f"http://127.0.0.1:{port}/v1/models"
    _wait_until_up(child, url, log, holds=name.encode())
    return Contender("dynamo frontend KV", f"127.0.0.1:{port}", psutil.Process(child.pid), name)


def _peer(
    children: Children,
    python: Path,
    project: str,
    workers: Workers,
    model: str,
    log: Path,
    pd_options: list[str] | None,
) -> Contender:
    """`pd_options`: what makes it a router of two pools, short of the decode workers."""
    port, metrics_port = free_port(), free_port()
    command = [str(python), "-m", f"{project}_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(metrics_port)]
    command += ["--policy", "cache_aware", "--log-level", "error", "--disable-retries"]
    urls = [f"http://{address}" for address in workers.decode]
    if pd_options is None:
        command += ["--worker-urls", *urls]
    else:
        command += [*pd_options, *(word for url in urls for word in ("--decode", url))]
    child = children.start(command, _NO_HUB, log)
    _wait_until_up(child, f"http://127.0.0.1:{port}/health", log)
    name = f"{project}-router " + ("cache_aware" if pd_options is None else "PD")
    return Contender(name, f"127.0.0.1:{port}", psutil.Process(child.pid), model)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_up(
    child: subprocess.Popen[str], url: str, log: Path, *, holds: bytes = b""
) -> None:
    """Until it answers 200 with `holds` in the body. Raises RuntimeError with the end of the log
    when it does not."""
    until_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until_s and child.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200 and holds in answer.read():
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer: {log.read_text()[-500:]}")


@contextlib.contextmanager
def children() -> Iterator[Children]:
    group = Children()
    try:
        yield group
    finally:
        group.close()
