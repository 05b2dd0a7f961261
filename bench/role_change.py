"""How long a worker takes to go over to the other pool, and what its streams feel of it.

    python -m bench.role_change [--model DIR] [--rounds N] [--streams N]

Starts `baton serve --no-ray` with two workers a pool and keeps streams running. In each round the
busiest worker of each pool goes over and comes back. Beside it: what a worker takes to start, which
is what a change of role spares, and gaps between tokens at other times. Every stream must come
whole; the rows go to a JSON file.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from baton.core.clock import MonotonicClock
from baton.core.worker_info import Role, WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.rpc.channel import open_channel
from baton.rpc.role_change import change_role
from baton.rpc.v1.worker_pb2 import GetInfoRequest
from baton.rpc.v1.worker_pb2_grpc import WorkerStub
from bench.cpu.contender_system import RunningSystem, running_system
from bench.cpu.workload import prompts
from bench.machine import RESULTS, describe, store

OUTPUT_TOKENS = 200
TIMEOUT_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.role_change", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="default: the one `baton serve` takes")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--streams", type=int, default=6, metavar="N", help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(argv)
    options = ["--no-ray", "--prefill", "2", "--decode", "2"]
    if args.model is not None:
        options += ["--model", args.model]
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        with running_system(*options, "--run-dir", folder) as system:
            result = asyncio.run(_measure(system, Path(folder), args))
        result["worker_start_s"] = _start_s(Path(folder))
    median_s = statistics.median(row["seconds"] for row in result["changes"])
    during, otherwise, median = (
        result[f"{name}_s"] * 1e3
        for name in ("longest_gap_during_changes", "longest_gap_otherwise", "median_gap")
    )
    print(f"change of role, median {median_s:.2f} s; start: {result['worker_start_s']:.2f} s")
    print(
        f"{result['num_streams']} streams came whole; between tokens {median:.0f} ms in the "
        f"median, at most {during:.0f} ms during changes and {otherwise:.0f} ms otherwise"
    )
    print("written to", store("role-change", {"machine": describe(), **result}, args.store))
    return 0


async def _measure(system: RunningSystem, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    streams = _Streams(system.http_port, args.seed)
    running = [asyncio.create_task(streams.run()) for _ in range(args.streams)]
    rows: list[dict[str, Any]] = []
    windows: list[tuple[float, float]] = []
    try:
        await asyncio.sleep(2.0)
        print(f"\n{'worker':>12}{'to':>10}{'seconds':>10}{'requests':>10}")
        for _ in range(args.rounds):
            for role in Role:
                info, num_requests = await _busiest(folder, role)
                for target in (role.other, role):
                    row = await _change(info, target, num_requests)
                    rows.append(row)
                    windows.append((row["began_s"], row["began_s"] + row["seconds"]))
                    print(
                        f"{row['worker']:>12}{row['to']:>10}{row['seconds']:10.3f}{num_requests:10}",
                        flush=True,
                    )
                    await asyncio.sleep(1.0)
    finally:
        streams.is_over = True
        await asyncio.gather(*running)
        await streams.close()
    inside, outside = [0.0], [0.0]
    for gap in streams.gaps:
        is_inside = any(gap.overlaps(*window) for window in windows)
        (inside if is_inside else outside).append(gap.seconds)
    return {
        "changes": rows,
        "num_streams": streams.num_whole,
        "streams_at_a_time": args.streams,
        "median_gap_s": statistics.median(gap.seconds for gap in streams.gaps),
        "longest_gap_during_changes_s": max(inside),
        "longest_gap_otherwise_s": max(outside),
    }


async def _busiest(folder: Path, role: Role) -> tuple[WorkerInfo, int]:
    """The worker of `role` with most requests, and their number."""
    registry = DirectoryRegistry(folder / "registry", clock=MonotonicClock())
    found: list[tuple[int, WorkerInfo]] = []
    for info in (await registry.list()).values():
        if info.role is role:
            async with open_channel(info.address) as channel:
                welcome = await WorkerStub(channel).GetInfo(GetInfoRequest(), timeout=TIMEOUT_S)
            load = welcome.load
            num_requests = load.num_running + load.num_waiting + load.reservations
            found.append((num_requests, info))
    num_requests, info = max(found, key=lambda each: each[0])
    return info, num_requests


async def _change(info: WorkerInfo, role: Role, num_requests: int) -> dict[str, Any]:
    began_s = time.perf_counter()
    await change_role(info.address, role, timeout_s=TIMEOUT_S)
    return {
        "worker": info.worker_id,
        "to": role.value,
        "requests": num_requests,
        "began_s": began_s,
        "seconds": time.perf_counter() - began_s,
    }


@dataclass(frozen=True, slots=True)
class _Gap:
    """Between two pieces of text of one stream."""

    from_s: float
    to_s: float

    @property
    def seconds(self) -> float:
        return self.to_s - self.from_s

    def overlaps(self, from_s: float, to_s: float) -> bool:
        return self.from_s < to_s and from_s < self.to_s


class _Streams:
    """Clients with one stream after the other. A stream that is cut raises in `run`."""

    def __init__(self, port: int, seed: int) -> None:
        url = f"http://127.0.0.1:{port}"
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False)
        self._seeds = itertools.count(seed * 100_000)
        self.is_over = False
        self.gaps: list[_Gap] = []
        self.num_whole = 0

    async def run(self) -> None:
        while not self.is_over:
            prompt = prompts(1, seed=next(self._seeds))[0]
            times = await self._token_times(prompt)
            self.gaps += [_Gap(*pair) for pair in itertools.pairwise(times)]
            self.num_whole += 1

    async def close(self) -> None:
        await self._client.aclose()

    async def _token_times(self, prompt: list[int]) -> list[float]:
        """When each piece of text came. Raises RuntimeError unless all tokens have come."""
        body = {
            "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        times: list[float] = []
        num_tokens = 0
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("choices"):
                    times.append(time.perf_counter())
                elif event.get("usage"):
                    num_tokens = event["usage"]["completion_tokens"]
                else:
                    raise RuntimeError(f"the stream ended with {line!r}")
        if num_tokens != OUTPUT_TOKENS:
            raise RuntimeError(f"{num_tokens} tokens of {OUTPUT_TOKENS} came")
        return times


def _start_s(folder: Path) -> float:
    """From a worker's first log line to the one that says that it is ready; the median."""
    seconds = []
    for file in folder.glob("logs/[pd]*.log"):
        lines = [json.loads(line) for line in file.read_text().splitlines() if line[:1] == "{"]
        ready = next(line for line in lines if "address" in line)
        first, last = (datetime.fromisoformat(line["at"]) for line in (lines[0], ready))
        seconds.append((last - first).total_seconds())
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
