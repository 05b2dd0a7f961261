"""`python -m services.router` as a process of its own, with no worker to talk to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from services.router import __main__ as process
from services.router.config import load_router_config


class Launcher:
    """Starts routers on free ports and ends them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.children: list[subprocess.Popen[str]] = []

    def start(
        self, *settings: str, parent: str | None = None, under_shell: bool = False
    ) -> subprocess.Popen[str]:
        defaults = (
            *(f"model_path={self._folder}", "model_name=tiny", "http_port=0", "grpc_port=0"),
            *("workers=127.0.0.1:9", "edge.stop_grace_s=0.1"),
        )
        command = [sys.executable, "-m", "services.router"]
        for setting in (*defaults, *settings):
            command += ["--set", setting]
        if parent is not None:
            command += ["--exit-with-parent", parent]
        if under_shell:
            line = shlex.join(command)
            command = ["sh", "-c", f"{line} --exit-with-parent $$ & wait"]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.children.append(child)
        return child

    def ready(self, child: subprocess.Popen[str]) -> dict[str, str]:
        """The fields of its ready line."""
        assert child.stderr is not None
        for line in child.stderr:
            fields = json.loads(line) if line.startswith("{") else {}
            if fields.get("message") == "router ready":
                return fields
        raise AssertionError("the router ended without getting ready")

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
            if child.stderr is not None:
                child.stderr.close()


@pytest.fixture
def launcher(tokenizer_folder):
    launcher = Launcher(tokenizer_folder)
    yield launcher
    launcher.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_without_workers_and_stops_on_a_signal(launcher, number):
    child = launcher.start()
    fields = launcher.ready(child)
    with httpx.Client(base_url=f"http://{fields['http']}", trust_env=False) as client:
        assert client.get("/version").status_code == 200
        assert client.get("/health").status_code == 503
        assert client.get("/v1/models").json()["data"] == []
        assert "baton_workers" in client.get("/metrics").text
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "service_unavailable"
    started_at = time.monotonic()
    child.send_signal(number)
    assert child.wait(timeout=8) == 0
    assert time.monotonic() - started_at < 5


def test_wrong_settings_are_one_readable_line(launcher):
    for settings in (["edge.max_body_bytes=0"], ["edge.colour=red"], ["nonsense"]):
        child = launcher.start(*settings)
        assert child.wait(timeout=20) == 2
        assert child.stderr is not None
        lines = child.stderr.read().splitlines()
        assert len(lines) == 1
        assert settings[0].split("=")[0] in lines[0]


def test_taken_port_is_one_readable_line(launcher):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        child = launcher.start(f"http_port={port}")
        assert child.wait(timeout=20) == 2
        assert child.stderr is not None
        (line,) = child.stderr.read().splitlines()
        assert str(port) in json.loads(line)["message"]


def test_ends_with_its_parent(launcher):
    """The parent is a shell that is killed; nobody is left to send a signal."""
    shell = launcher.start(under_shell=True)
    pid = int(launcher.ready(shell)["pid"])
    shell.kill()
    try:
        # The pipe is at its end once the router has closed it, too.
        assert "router stopped" in shell.stderr.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_doors_close_though_a_session_will_not_end(
    tokenizer_folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(process, "CORE_STOP_TIMEOUT_S", 0.05)
    values = {
        **{"model_path": tokenizer_folder, "model_name": "tiny", "workers": ["127.0.0.1:9"]},
        **{"http_port": 0, "grpc_port": 0, "edge": {"stop_grace_s": 0.1}},
        "copy": {"own_port": 0, "targets_dir": tmp_path},
    }
    router = process.RouterProcess(load_router_config(overrides=values))
    await router.start()
    assert list(tmp_path.iterdir())
    stop_core = router._core.stop
    monkeypatch.setattr(router._core, "stop", lambda: asyncio.sleep(60))
    await router.stop()
    assert not list(tmp_path.iterdir()), "nobody is sent to a copy that has ended"
    assert "did not end within" in caplog.text
    await stop_core()


def test_does_not_start_without_its_parent(launcher):
    assert launcher.start(parent="1").wait(timeout=20) == 1
