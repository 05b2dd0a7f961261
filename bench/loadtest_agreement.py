"""`baton bench` beside `vllm bench serve` on the same live server: do both tell the same.

    python -m bench.loadtest_agreement --vllm-rs PATH [--rounds 5] [--concurrency 4] [--requests 32]

`vllm-rs` is the load generator inside vLLM's wheel, a program of its own:

    pip download --no-deps -d wheels vllm==0.33.0 && unzip wheels/vllm-0.33.0-*.whl 'vllm/vllm-rs'

The server is `baton serve --no-ray`, or with --modelled its router over workers that take the time
of computing without computing (`bench/router/modelled_worker.py`): on a machine that shares its
cores the latter says more of the tools and less of the neighbours.

Each round is one run of each, in alternating order or with --together at the same time (so that
both meet the same server and the same neighbours), closed loop, equal lengths and concurrency.
Told are ratios of their medians (ours over theirs) round by round, and of the medians of all
rounds. Prompts never repeat, so neither warms the cache for the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx

from baton.cli.model import import_default
from bench import machine
from bench.router.contenders import Workers, children
from bench.router.contenders import ours as ours_router

READY_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 600.0


class Seen(NamedTuple):
    """Medians of one run in milliseconds, rates per second."""

    ttft_ms: float
    itl_ms: float
    """Mean gap of each request, which vLLM calls TPOT."""
    gap_ms: float
    """Single gaps, which vLLM calls ITL."""
    e2e_ms: float
    requests_per_s: float
    output_tokens_per_s: float


class Load(NamedTuple):
    url: str
    model: str
    tokenizer: Path
    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int


Tool = Callable[[Load, int, Path], Seen]
"""Load, seed, folder for its report."""


def ours(load: Load, seed: int, folder: Path) -> Seen:
    told = folder / f"ours-{seed}.json"
    command = [sys.executable, "-m", "baton.cli.main", "bench", "--url", load.url, "--quiet"]
    command += ["--completions", "--lengths", f"{load.prompt_tokens}/{load.output_tokens}"]
    command += ["--requests", str(load.requests), "--concurrency", str(load.concurrency)]
    command += ["--seed", str(seed), "--json", str(told), "--share", "0"]
    _run(command)
    figures = json.loads(told.read_text())["figures"]
    _check(figures["num_ok"], load)
    medians = {name: 1000 * d["p50"] for name, d in figures["latencies"].items() if d}
    rates = figures["rates"]
    return Seen(
        medians["ttft_s"],
        medians["itl_s"],
        medians["gap_s"],
        medians["e2e_s"],
        rates["requests_per_s"],
        rates["output_tokens_per_s"],
    )


def theirs(binary: Path) -> Tool:
    def run(load: Load, seed: int, folder: Path) -> Seen:
        name = f"theirs-{seed}.json"
        command = [str(binary), "bench", "serve", "--backend", "openai", "--base-url", load.url]
        command += ["--model", load.model, "--tokenizer", str(load.tokenizer), "--dataset-name"]
        command += ["random", "--random-input-len", str(load.prompt_tokens)]
        command += ["--random-output-len", str(load.output_tokens), "--ignore-eos"]
        command += ["--num-prompts", str(load.requests), "--seed", str(seed), "--disable-tqdm"]
        command += ["--max-concurrency", str(load.concurrency), "--temperature", "0"]
        command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result"]
        command += ["--result-dir", str(folder), "--result-filename", name]
        _run(command)
        told = json.loads((folder / name).read_text())
        _check(told["completed"], load)
        return Seen(
            told["median_ttft_ms"],
            told["median_tpot_ms"],
            told["median_itl_ms"],
            told["median_e2el_ms"],
            told["request_throughput"],
            told["output_throughput"],
        )

    return run


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


def _check(num_ok: int, load: Load) -> None:
    if num_ok != load.requests:
        raise RuntimeError(f"{num_ok} of {load.requests} requests were answered")


@contextlib.contextmanager
def system(model: Path) -> Iterator[str]:
    """A live `baton serve --no-ray`; yields its URL."""
    ports = [_free_port() for _ in range(2)]
    command = [sys.executable, "-m", "baton.cli.main", "serve", "--no-ray"]
    command += ["--http-port", str(ports[0]), "--grpc-port", str(ports[1])]
    command += ["--model", str(model)]
    url = f"http://127.0.0.1:{ports[0]}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@contextlib.contextmanager
def modelled(model: Path) -> Iterator[str]:
    """The router over modelled workers; yields its URL."""
    with children() as group, tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.router.modelled_worker", "--model", model.name]
        command += ["--prefill", "1", "--decode", "1", "--token-us", "200", "--itl-ms", "15"]
        (prefill, decode) = group.ready_address(group.start(command, os.environ)).split(",")
        workers = Workers((prefill,), (decode,))
        router = ours_router(group, workers, model, Path(folder) / "router.log")
        yield f"http://{router.address}"


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until_s and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError("the system did not become ready")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def compare(
    load: Load, tools: dict[str, Tool], rounds: int, *, together: bool
) -> dict[str, object]:
    seen: dict[str, list[Seen]] = {name: [] for name in tools}
    first_seed = random.SystemRandom().getrandbits(24)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            names = sorted(tools, reverse=bool(number % 2))
            with ThreadPoolExecutor(len(names) if together else 1) as threads:
                runs = {
                    name: threads.submit(tools[name], load, first_seed + number, Path(folder))
                    for name in names
                }
            for name, run in runs.items():
                seen[name].append(run.result())
                print(f"round {number + 1} {name}: {seen[name][-1]}", flush=True)
    ratios = [
        {field: getattr(a, field) / getattr(b, field) for field in Seen._fields}
        for a, b in zip(seen["ours"], seen["theirs"], strict=True)
    ]
    medians = {
        name: {f: statistics.median(getattr(s, f) for s in all_seen) for f in Seen._fields}
        for name, all_seen in seen.items()
    }
    return {
        "medians": medians,
        "ratio_of_medians": {f: medians["ours"][f] / medians["theirs"][f] for f in Seen._fields},
        "median_of_ratios": {f: statistics.median(r[f] for r in ratios) for f in Seen._fields},
        "ratios": ratios,
        "rounds": {name: [s._asdict() for s in all_seen] for name, all_seen in seen.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-rs", type=Path, required=True, metavar="PATH")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="a server that runs already; else one is started")
    where.add_argument("--modelled", action="store_true", help="workers that compute nothing")
    parser.add_argument("--together", action="store_true", help="both at the same time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    args = parser.parse_args()
    model = import_default(os.environ, dtype="bfloat16")
    with contextlib.ExitStack() as stack:
        url = args.url or stack.enter_context(modelled(model) if args.modelled else system(model))
        load = Load(
            url,
            model.resolve().name,
            model,
            args.requests,
            args.concurrency,
            args.prompt_tokens,
            args.output_tokens,
        )
        told = compare(
            load,
            {"ours": ours, "theirs": theirs(args.vllm_rs)},
            args.rounds,
            together=args.together,
        )
    arguments = {k: v for k, v in vars(args).items() if k not in ("vllm_rs", "url")}
    result = {"machine": machine.describe(), "arguments": arguments, **told}
    print(json.dumps(told["ratio_of_medians"], indent=1))
    print(machine.store("loadtest-agreement", result))


if __name__ == "__main__":
    main()
