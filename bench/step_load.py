"""A live system under a step of load: it grows, keeps its targets again, and shrinks unnoticed.

One machine, the real engine with one thread a worker, one prefill and one decode worker to begin
with, each with room for a few sequences, as memory has it. What one decode worker can do is
measured first: how long its steps take, and how many requests it answers in a second when it has
more than it can take. Targets and rates follow from that:

    low rate ── step ──► more than one decode worker carries ── step ──► low rate, some of it long

Told are attainment by windows of arrival, decisions with their reasons, and streams that did not
come whole, which must be none.

    python -m bench.step_load --out bench/results --plot step.png
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.machine import describe, store
from bench.stream import token_times

READY_TIMEOUT_S = 300.0
PROMPT_TOKENS = 32
OUTPUT_TOKENS = 96
LONG_TOKENS = 384
LONG_SHARE = 0.15
"""Of requests after the high rate: some of them run when a worker is drained."""
MAX_SEQUENCES = 8
"""In a decode worker at a time."""
SLACK = 3.0
"""Target between tokens, by what a full batch takes. Who waits for a place in one waits between its
first token and its second."""
LOW, HIGH = 0.25, 2.3
"""Rates, by what one decode worker carries."""
SATURATED_S = 25.0
MAX_DECODE = 3
WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of one decode worker, through the whole system."""

    fixed_s: float
    sequence_s: float
    prompt_s: float
    """Until the first token, with nothing else to do."""
    capacity_per_s: float
    """Requests answered when there are always more."""

    def step_s(self, batch: float) -> float:
        return self.fixed_s + self.sequence_s * batch


@dataclass(frozen=True, slots=True)
class Request:
    """One stream as its client saw it."""

    at_s: float
    ended_s: float
    num_tokens: int
    ttft_s: float | None
    itl_s: float | None
    """None for both: it did not come whole."""
    failure: str = ""


class System:
    """`baton serve` as a child."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.port, grpc_port = free_port(), free_port()
        self.folder = folder
        self._output = folder / "output.txt"
        command = [
            *(sys.executable, "-m", "baton.cli.main", "serve", "--no-ray", *arguments),
            *("--http-port", str(self.port), "--grpc-port", str(grpc_port)),
            *("--run-dir", str(folder / "run")),
            *("--set", "router.policy.local_prefill_max_tokens=0"),
            *(f"--set={pool}.engine.num_threads=1" for pool in ("prefill", "decode")),
            f"--set=decode.engine.max_num_seqs={MAX_SEQUENCES}",
        ]
        folder.mkdir(parents=True, exist_ok=True)
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def __enter__(self) -> System:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while "\nready in" not in self._output.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"not ready:\n{self._output.read_text()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def decisions(self) -> Path:
        return self.folder / "run" / "decisions.jsonl"

    def migrations(self) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).text
        moved = 'baton_migrations_total{reason="drain",result="moved"'
        return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(moved))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(100, 20_000) for _ in range(PROMPT_TOKENS)]


async def measure(port: int, rng: random.Random) -> Speeds:
    """Means, since a machine that others use too makes workers wait now and then."""
    first, single_s = float("inf"), 0.0
    for _ in range(3):
        began_s = time.perf_counter()
        times = await token_times(port, prompt(rng), OUTPUT_TOKENS)
        first = min(first, times[0] - began_s)
        single_s = (times[-1] - times[0]) / (len(times) - 1)
    ended = await run_clients(port, ((SATURATED_S, 2 * MAX_SEQUENCES, 0.0),), rng)
    half_s = SATURATED_S / 2
    capacity = sum(half_s <= r.ended_s < SATURATED_S for r in ended) / half_s
    full_s = MAX_SEQUENCES / (OUTPUT_TOKENS * capacity)
    sequence_s = max(0.02 * full_s, (full_s - single_s) / (MAX_SEQUENCES - 1))
    return Speeds(max(1e-4, full_s - sequence_s * MAX_SEQUENCES), sequence_s, first, capacity)


def profile(speeds: Speeds, start_s: float) -> dict[str, Any]:
    """As `baton profile` writes it, of what was measured here."""
    held = PROMPT_TOKENS + OUTPUT_TOKENS / 2
    shared = {
        # So much that as many sequences fit as the worker takes, with what a planner keeps free.
        "tensor_parallel": 1, "max_kv_tokens": int(MAX_SEQUENCES * held / 0.9), "start_s": start_s,
        "prefill_token_s": speeds.prompt_s / PROMPT_TOKENS, "prefill_pair_s": 0.0,
        "decode_sequence_s": speeds.sequence_s, "decode_kv_token_s": 0.0,
        "link_bytes_per_second": 2e9, "step_fixed_s": speeds.fixed_s,
    }  # fmt: skip
    return {
        "source": "one decode worker of this machine, measured just now",
        "kv_bytes_per_token": 23_040,
        "workers": [shared],
    }


async def run_clients(
    port: int, phases: Sequence[tuple[float, int, float]], rng: random.Random
) -> list[Request]:
    """`phases`: (seconds, clients that ask again at once, share of long answers)."""
    began_s = time.perf_counter()
    end_s = 0.0
    found: list[Request] = []

    async def client(until_s: float, long_share: float) -> None:
        while time.perf_counter() - began_s < until_s:
            num_tokens = LONG_TOKENS if rng.random() < long_share else OUTPUT_TOKENS
            found.append(await one(port, began_s, prompt(rng), num_tokens))

    running: list[asyncio.Task[None]] = []
    for seconds, num_clients, long_share in phases:
        end_s += seconds
        running += [asyncio.create_task(client(end_s, long_share)) for _ in range(num_clients)]
        await asyncio.sleep(max(0.0, began_s + end_s - time.perf_counter()))
    await asyncio.gather(*running)
    return found


async def run_phases(
    port: int, phases: Sequence[tuple[float, float, float]], rng: random.Random
) -> list[Request]:
    """`phases`: (seconds, requests per second, share of long ones); Poisson, all at their time."""
    began_s = time.perf_counter()
    running: list[asyncio.Task[Request]] = []
    at_s = end_s = 0.0
    for seconds, rate, long_share in phases:
        end_s += seconds
        at_s = max(at_s, end_s - seconds)
        while (at_s := at_s + rng.expovariate(rate)) < end_s:
            await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
            num_tokens = LONG_TOKENS if rng.random() < long_share else OUTPUT_TOKENS
            running.append(asyncio.create_task(one(port, began_s, prompt(rng), num_tokens)))
    return list(await asyncio.gather(*running))


async def one(port: int, origin_s: float, ids: list[int], num_tokens: int) -> Request:
    began_s = time.perf_counter()
    at_s = began_s - origin_s
    try:
        times = await token_times(port, ids, num_tokens)
    except (OSError, RuntimeError, TimeoutError) as error:
        ended_s = time.perf_counter() - origin_s
        return Request(at_s, ended_s, num_tokens, None, None, f"{type(error).__name__}: {error}")
    itl_s = (times[-1] - times[0]) / max(1, len(times) - 1)
    return Request(at_s, times[-1] - origin_s, num_tokens, times[0] - began_s, itl_s)


def windows(requests: Sequence[Request], ttft_s: float, itl_s: float) -> list[dict[str, float]]:
    """Attainment of requests by when they came."""
    rows = []
    last = max(r.at_s for r in requests)
    for i in range(int(last / WINDOW_S) + 1):
        mine = [r for r in requests if i * WINDOW_S <= r.at_s < (i + 1) * WINDOW_S]
        if not mine:
            continue
        num = len(mine)
        rows.append(
            {
                "from_s": i * WINDOW_S,
                "rate_per_s": num / WINDOW_S,
                "ttft": sum(r.ttft_s is not None and r.ttft_s <= ttft_s for r in mine) / num,
                "itl": sum(r.itl_s is not None and r.itl_s <= itl_s for r in mine) / num,
            }
        )
    return rows


def decisions(file: Path, began_s: float) -> list[dict[str, Any]]:
    """What each said; times since the first request."""
    rows = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        seen, decided = record["seen"], record["decision"]
        rows.append(
            {
                "at_s": seen["now_s"] - began_s,
                "rate_per_s": seen["load"]["rate_per_s"],
                "decode_ready": seen["decode"]["num_ready"],
                "decode_starting": seen["decode"]["num_starting"],
                "decode_draining": seen["decode"]["num_draining"],
                "desired": decided["decode"]["desired"],
                "reason": decided["decode"]["reason"],
                "correction": record["decode_step"]["ratio"],
                "orders": record["orders"],
            }
        )
    return rows


def main() -> None:
    args = _arguments()
    rng = random.Random(args.seed)
    model = ["--model", str(args.model)] if args.model else []
    folder = Path(tempfile.mkdtemp(prefix="step-load-"))
    with System(model, folder / "measured") as system:
        speeds = asyncio.run(measure(system.port, rng))
    step_s = speeds.step_s(MAX_SEQUENCES)
    itl_s, ttft_s = SLACK * step_s, max(1.0, 10 * speeds.prompt_s)
    capacity = speeds.capacity_per_s
    print(
        f"{speeds}; TTFT {ttft_s:.2f} s, ITL {1000 * itl_s:.0f} ms, {capacity:.2f} requests/s",
        flush=True,
    )
    file = folder / "profile.json"
    file.write_text(json.dumps(profile(speeds, args.start)))
    settings = {
        "ttft_s": ttft_s, "itl_s": itl_s, "profile": file, "interval_s": 4, "window_s": 40,
        "forecast_s": 10, "cold_s": 5, "max_devices": 1 + MAX_DECODE, "prefill.max_workers": 1,
        "decode.max_workers": MAX_DECODE,
    }  # fmt: skip
    options = [f"--set=autoscale.{name}={value}" for name, value in settings.items()]
    phases = (
        (args.low, LOW * capacity, 0.0),
        (args.high, HIGH * capacity, 0.0),
        (args.after, LOW * capacity, LONG_SHARE),
    )
    with System([*model, "--autoscale", *options], folder / "scaled") as system:
        began_s = time.time()
        requests = asyncio.run(run_phases(system.port, phases, rng))
        moved = system.migrations()
        rows = decisions(system.decisions, began_s)
    result = {
        "machine": describe(),
        "speeds": asdict(speeds),
        "objective": {"ttft_s": ttft_s, "itl_s": itl_s},
        "capacity_per_s": capacity,
        "phases": phases,
        "requests": len(requests),
        "aborted": sum(r.ttft_s is None for r in requests),
        "failures": sorted({r.failure for r in requests if r.failure}),
        "moved_in_drains": moved,
        "windows": windows(requests, ttft_s, itl_s),
        "decisions": rows,
    }
    tell(result)
    print(f"wrote {store('step-load', result, args.out)}")
    if args.plot is not None:
        draw(result, args.plot)


def tell(result: dict[str, Any]) -> None:
    for row in result["windows"]:
        print(
            f"{row['from_s']:5.0f} s  {row['rate_per_s']:5.2f} requests/s  "
            f"TTFT {row['ttft']:.2f}  ITL {row['itl']:.2f}"
        )
    for row in result["decisions"]:
        if row["orders"]:
            print(f"{row['at_s']:5.0f} s  {', '.join(row['orders'])}: {row['reason']}")
    print(
        f"{result['requests']} requests, {result['aborted']} aborted, "
        f"{result['moved_in_drains']:.0f} moved to another worker in drains"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (load, workers, kept) = plt.subplots(3, 1, figsize=(8, 7), sharex=True)
    at_s = [row["from_s"] + WINDOW_S / 2 for row in result["windows"]]
    load.bar(at_s, [row["rate_per_s"] for row in result["windows"]], width=0.9 * WINDOW_S)
    load.axhline(result["capacity_per_s"], linestyle="--", label="what one decode worker carries")
    load.set_ylabel("requests/s")
    load.legend()
    times = [row["at_s"] for row in result["decisions"]]
    for name in ("ready", "starting", "draining"):
        workers.step(
            times, [row[f"decode_{name}"] for row in result["decisions"]], where="post", label=name
        )
    workers.set_ylabel("decode workers")
    workers.legend()
    for name in ("ttft", "itl"):
        kept.plot(at_s, [row[name] for row in result["windows"]], label=name.upper())
    kept.set_ylabel("share kept")
    kept.set_ylim(0, 1.05)
    kept.set_xlabel("seconds")
    kept.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: that of `baton serve`")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--low", type=float, default=40.0, metavar="S")
    parser.add_argument("--high", type=float, default=120.0, metavar="S")
    parser.add_argument("--after", type=float, default=180.0, metavar="S")
    parser.add_argument("--start", type=float, default=15.0, metavar="S", help="of a worker")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
