"""One running `baton serve` under test: start, inspect, interrupt."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from baton.core.tls import TlsFiles
from baton.rpc.tls import channel_credentials, channel_options
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc

READY_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 30.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class RunningSystem:
    """One `baton serve`, from its start to its end."""

    arguments: list[str]
    run_dir: Path
    http_port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    members: set[int] = field(default_factory=set)
    tls: TlsFiles | None = None
    """With which to ask the workers; they were started with the same."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def _output_file(self) -> Path:
        return self.run_dir / "output.txt"

    @property
    def output(self) -> str:
        """What the command has printed so far."""
        return self._output_file.read_text()

    def start(self) -> None:
        """Returns when the command has said that it is ready."""
        self.launch()
        assert self.process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        while "\nready in" not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not ready:\n{self.output}\n{self.logs()}")
            time.sleep(0.05)
        self.members = {p.pid for p in psutil.Process(self.process.pid).children(recursive=True)}

    def launch(self) -> None:
        """Start the command and return at once."""
        command = [
            sys.executable, "-m", "baton.cli.main", "serve", "--run-dir", str(self.run_dir),
            "--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port),
            *self.arguments,
        ]  # fmt: skip
        with self._output_file.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def interrupt(self, timeout_s: float, number: signal.Signals = signal.SIGINT) -> float:
        """Ctrl-C, or another signal; returns the seconds until the command had ended."""
        assert self.process is not None
        members = psutil.Process(self.process.pid).children(recursive=True)
        self.members |= {p.pid for p in members}
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout_s)
        return time.monotonic() - start

    def kill(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.kill()
        self.process.kill()
        self.process.wait(10)

    def leftovers(self) -> list[int]:
        """Members of the system that still run."""
        return [
            pid
            for pid in self.members
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        ]

    def logs(self) -> str:
        return "\n".join(
            f"--- {p.name}\n{p.read_text()[-3000:]}" for p in self.run_dir.glob("logs/*")
        )

    def worker_addresses(self) -> list[str]:
        """Where the workers listen, from the last `ready` line of each log."""
        ready: dict[str, str] = {}
        for file in self.run_dir.glob("logs/[pd]*.log"):
            for line in file.read_text().splitlines():
                if '"address"' in line and '"role"' in line:
                    ready[file.name] = json.loads(line)["address"]
        return list(ready.values())

    def workers(self) -> list[worker_pb2.Welcome]:
        """What each worker says of itself, asked over gRPC."""
        answers = []
        for address in self.worker_addresses():
            with self._channel(address) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                answers.append(stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=10))
        return answers

    def _channel(self, address: str) -> grpc.Channel:
        if self.tls is None:
            return grpc.insecure_channel(address)
        options = channel_options(self.tls)
        return grpc.secure_channel(address, channel_credentials(self.tls), options=options)

    def worker(self, role: str) -> worker_pb2.WorkerInfo:
        """The identity of the only worker of `role` (prefill or decode)."""
        number = worker_pb2.Role.Value(f"ROLE_{role.upper()}")
        (info,) = (w.info for w in self.workers() if w.info.role == number)
        return info

    def assert_nothing_leaked(self) -> None:
        """All blocks free or cached, no lease, no reservation, on every worker."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            loads = [w.load for w in self.workers()]
            if all(is_idle(load) for load in loads):
                return
            assert time.monotonic() < deadline, f"leaked: {loads}"
            time.sleep(0.2)


def is_idle(load: worker_pb2.LoadReport) -> bool:
    held = load.num_running + load.num_waiting + load.leases + load.reservations
    everything = load.free_blocks + load.cached_blocks == load.total_blocks
    return held == 0 and load.quarantined_blocks == 0 and everything
