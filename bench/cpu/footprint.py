"""Time to ready and resident memory of the whole system, with and without Ray.

Memory is the sum of the processes' proportional set sizes (shared pages counted once), after
`num_streams` prompts have been computed and answered.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.cpu.contender_system import START_TIMEOUT_S, free_port, run


@dataclass(frozen=True)
class Footprint:
    """One start of the system."""

    ready_s: float
    idle_bytes: int
    loaded_bytes: int
    stop_s: float


def measure_footprint(model_dir: str, mode: str, seed: int) -> Footprint:
    """Start `baton serve` with `mode` (--ray or --no-ray), load it, stop it."""
    port = free_port()
    command = [
        sys.executable, "-m", "baton.cli.main", "serve", mode, "--model", model_dir,
        "--http-port", str(port), "--grpc-port", str(free_port()),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, text=True, start_new_session=True)
        try:
            ready_s = _wait_until_ready(process, Path(f"/proc/self/fd/{output.fileno()}"))
            idle = _resident_bytes(process.pid)
            asyncio.run(run(port, seed))
            loaded = _resident_bytes(process.pid)
        finally:
            start = time.perf_counter()
            process.send_signal(signal.SIGINT)
            process.wait(30)
        return Footprint(ready_s, idle, loaded, time.perf_counter() - start)


def _wait_until_ready(process: subprocess.Popen[str], output: Path) -> float:
    """Seconds from the start of the command, as it says itself."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        match = re.search(r"^ready in ([0-9.]+) s", output.read_text(), re.MULTILINE)
        if match:
            return float(match.group(1))
        time.sleep(0.1)
    raise RuntimeError(f"the system did not become ready: {output.read_text()[-500:]}")


def _resident_bytes(pid: int) -> int:
    members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(int(member.memory_full_info().pss) for member in members)
