"""The whole system over HTTP. Usage: MODEL_DIR DTYPE THREADS SEED colocated|disaggregated

Decode rates are the sum of each stream's rate between its own first and last token, as a user sees
it: unlike in the other contenders, other streams' prompts may be computed in between.

Starts `baton serve --no-ray` on free ports, streams completions, stops it again. Colocated means
no prefill worker: the decode worker computes prompts itself, through the same router and HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.cpu.workload import (
    OUTPUT_LEN,
    PROMPT_LEN,
    STREAM_COUNTS,
    Rates,
    prompts,
    report,
)
from bench.stream import token_times

START_TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class RunningSystem:
    """One `baton serve` that is ready."""

    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    ready_s: float
    """From the start of the command, as it says itself."""
    stop_s: float = 0.0
    """Known once it has stopped."""


@contextlib.contextmanager
def running_system(
    *options: str, start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[RunningSystem]:
    """`baton serve` with `options` on free ports. Its workers share the cores by themselves."""
    http_port, grpc_port = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "baton.cli.main", "serve", *options),
        *("--http-port", str(http_port), "--grpc-port", str(grpc_port)),
    ]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, text=True, start_new_session=True)
        system = RunningSystem(process, http_port, grpc_port, ready_s=0.0)
        try:
            printed = Path(f"/proc/self/fd/{output.fileno()}")
            system.ready_s = _wait_until_ready(process, printed, start_timeout_s)
            yield system
        finally:
            start = time.perf_counter()
            process.send_signal(signal.SIGINT)
            process.wait(30)
            system.stop_s = time.perf_counter() - start


def _wait_until_ready(process: subprocess.Popen[str], output: Path, timeout_s: float) -> float:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        match = re.search(r"^ready in ([0-9.]+) s", output.read_text(), re.MULTILINE)
        if match:
            return float(match.group(1))
        time.sleep(0.1)
    raise RuntimeError(f"the system did not become ready: {output.read_text()[-500:]}")


async def stream(port: int, ids: list[int], output_len: int) -> tuple[float, float]:
    """(first token, last token) as monotonic times."""
    times = await token_times(port, ids, output_len)
    return times[0], times[-1]


async def run(port: int, seed: int) -> Rates:
    """The job over HTTP, on a system that is ready."""
    await stream(port, prompts(1, seed=seed)[0], 4)
    start = time.perf_counter()
    first, _ = await stream(port, prompts(1, seed=seed + 1)[0], 2)
    prefill = PROMPT_LEN / (first - start)
    decode: dict[int, float] = {}
    for n in STREAM_COUNTS:
        batch = prompts(n, seed=seed + 10 + n)
        start = time.perf_counter()
        times = await asyncio.gather(*(stream(port, p, OUTPUT_LEN) for p in batch))
        decode[n] = sum((OUTPUT_LEN - 1) / (last - first) for first, last in times)
        total = n * OUTPUT_LEN / (max(last for _, last in times) - start)
    return Rates(prefill, decode[1], decode[8], total)


def main(model_dir: str, dtype: str, seed: int, mode: str) -> None:
    num_prefill = "0" if mode == "colocated" else "1"
    options = ("--no-ray", "--model", model_dir, "--dtype", dtype, "--prefill", num_prefill)
    with running_system(*options) as system:
        report(asyncio.run(run(system.http_port, seed)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[4]), sys.argv[5])
