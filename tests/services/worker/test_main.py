"""How a worker process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.worker_info import Role
from baton.process import EXIT_FAILED
from services.worker import main

ROOT = Path(__file__).parents[3]


class LeftNow(Exception):
    """Stands for the end of the process."""


class Server:
    """A worker that starts at once."""

    def __init__(self, fails: bool, drains: list[float]) -> None:
        self._fails = fails
        self._drains = drains

    async def start(self) -> None:
        if not self._fails:
            asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)

    async def failed(self) -> None:
        if not self._fails:
            await asyncio.Event().wait()

    async def stop(self, drain_s: float) -> None:
        self._drains.append(drain_s)


@pytest.fixture
def run_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def run(*, fails: bool) -> tuple[int, list[float]]:
        drains: list[float] = []

        def leave(code: int) -> None:
            raise LeftNow(code)

        monkeypatch.setattr(main, "WorkerServer", lambda config: Server(fails, drains))
        monkeypatch.setattr(main, "_leave_now", leave)
        monkeypatch.setattr(main, "start_logging", lambda *args, **kwargs: None)
        arguments = ["--model", str(tmp_path), "--set", "drain_s=7"]
        try:
            code = main.run(Role.DECODE, {"role": "decode"}, arguments)
        except LeftNow as left:
            code = left.args[0]
        return code, drains

    return run


def test_failed_worker_exits_with_failure_and_does_not_drain(run_worker) -> None:
    assert run_worker(fails=True) == (EXIT_FAILED, [0])


def test_stopped_worker_drains_and_exits_well(run_worker) -> None:
    assert run_worker(fails=False) == (0, [7])


@pytest.mark.parametrize(
    "module",
    ["services.prefill.__main__", "services.decode.__main__", "services.prefill.deployment"],
)
def test_thread_policy_can_still_be_set_when_the_engine_is_built(module: str) -> None:
    """Nothing that a worker or a replica imports loads torch or an OpenMP runtime before."""
    program = (
        f"import sys, {module}, baton.engine.factory, services.worker.backend as backend\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'libgomp' not in open('/proc/self/maps').read()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
