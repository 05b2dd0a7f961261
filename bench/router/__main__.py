"""The router beside its peers: index, placement, and end to end over workers that compute nothing.

    python -m bench.router [--only PART ...] [--sglang PYTHON] [--vllm PYTHON] [--dynamo PYTHON]

index       inserts, matches and memory of the prefix index beside Dynamo's radix tree
soak        memory of the prefix index over `--soak-events` events
placement   time of a whole placement by number of workers
end_to_end  latency, requests, tokens, memory beside sglang-router, vllm-router, Dynamo's frontend
overload    three times the capacity: attainment of what is admitted, speed of what is refused
copies      two router processes beside one: what two keep of the hit rate
replay      a conversation trace through the real policies: hit rate and TTFT by policy

Peers run from Python environments of their own; what is not given is left out and said. Prints
tables of medians; everything is in the JSON under bench/results.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baton.cli.model import import_default
from bench import machine
from bench.router.contenders import (
    Children,
    Contender,
    children,
    dynamo_frontend,
    http_workers,
    ours,
    session_workers,
    sglang_router,
    vllm_router,
)
from bench.router.copies import run_copies
from bench.router.end_to_end import (
    CONCURRENCIES,
    STREAM_CONCURRENCIES,
    answers,
    direct_session,
    memory,
    streams,
)
from bench.router.index import run_index
from bench.router.overload import run_overload
from bench.router.placement import run_placement
from bench.router.replay import run_replay
from bench.router.soak import run_soak

STEP_MS = 5.0


def run_end_to_end(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, children() as group:
        contenders, left_out, floor = _start(args, group, Path(folder))
        result: dict[str, Any] = {"left_out": left_out, "answers": [], "streams": [], "memory": []}
        result["direct_session"] = asyncio.run(direct_session(floor, seconds=args.seconds))
        for concurrency in CONCURRENCIES:
            rows = asyncio.run(
                answers(contenders, concurrency, rounds=args.rounds, seconds=args.seconds)
            )
            result["answers"] += map(asdict, rows)
            _print(f"one-token answers, {concurrency} at a time", result["answers"][-len(rows) :])
        for concurrency in STREAM_CONCURRENCIES:
            seen = asyncio.run(
                streams(contenders, concurrency, rounds=args.rounds, seconds=2 * args.seconds)
            )
            result["streams"] += map(asdict, seen)
            _print(f"streams, {concurrency} at a time", result["streams"][-len(seen) :])
        result["memory"] = asyncio.run(
            memory(contenders, num_prompts=args.prompts, seconds=args.memory_s, seed=args.seed)
        )
        _print("unique prompts of 32 KiB", result["memory"])
    return result


def _start(
    args: argparse.Namespace, group: Children, folder: Path
) -> tuple[list[Contender], list[str], str]:
    """All contenders that can be started, those left out with the reason, a worker's address."""
    model_path: Path = args.model or import_default(os.environ, dtype="float32")
    model = model_path.resolve().name
    session = session_workers(group, model, STEP_MS)
    http = http_workers(group, model, STEP_MS)
    contenders = [ours(group, session, model_path, folder / "baton.log")]
    left_out = []
    for name, python, start in (
        ("sglang-router", args.sglang, sglang_router),
        ("vllm-router", args.vllm, vllm_router),
    ):
        for is_pd in (False, True):
            log = folder / f"{name}-{is_pd}.log"
            if python is None:
                left_out.append(f"{name}: no Python environment given")
                break
            try:
                contenders.append(start(group, python, http, model, log, is_pd=is_pd))
            except RuntimeError as error:
                left_out.append(f"{name} {'PD' if is_pd else 'cache_aware'}: {error}")
    if args.dynamo is None:
        left_out.append("dynamo frontend: no Python environment given")
    else:
        try:
            contenders.append(
                dynamo_frontend(
                    group, args.dynamo, model_path, folder / "dynamo.log", step_ms=STEP_MS
                )
            )
        except RuntimeError as error:
            left_out.append(f"dynamo frontend: {error}")
    for line in left_out:
        print(f"  left out: {line}", flush=True)
    return contenders, left_out, session.decode[0]


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    if not rows:
        return
    names = list(rows[0])
    print("  " + "  ".join(f"{name:>18}" for name in names))
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("  " + "  ".join(f"{cell:>18}" for cell in cells), flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "index": run_index,
    "soak": run_soak,
    "placement": run_placement,
    "end_to_end": run_end_to_end,
    "overload": run_overload,
    "copies": run_copies,
    "replay": run_replay,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", type=Path, help="folder with a tokenizer (default: SmolLM2)")
    for peer in ("sglang", "vllm", "dynamo"):
        parser.add_argument(f"--{peer}", type=Path, help="python of an environment that has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round")
    parser.add_argument("--prompts", type=int, default=50_000)
    parser.add_argument("--memory-s", type=float, default=60.0, help="for these, by contender")
    parser.add_argument("--soak-events", type=int, default=10**8, help="on the index")
    parser.add_argument("--soak-s", type=float, default=180.0, help="for these at most")
    parser.add_argument("--trace", type=Path, help="of the Mooncake format, for the replay")
    parser.add_argument("--requests", type=int, help="of the trace, from its start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine.describe()}
    for name in args.only:
        print(f"\n== {name}", flush=True)
        result[name] = PARTS[name](args)
    print(f"\n{machine.store('router', result, args.out)}")


if __name__ == "__main__":
    main()
