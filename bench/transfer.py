"""The KV fabric beside its limits: rates of reads, and (with --system) what a user feels of them.

    python -m bench.transfer [--rounds N] [--budget-s S] [--links | --system] [--out DIR]
    python -m bench.transfer --gpu --tokenizer DIR ...       the same between two GPUs

links    GB/s of scattered blocks by transport, block size, count and tensor-parallel pair, beside
         memcpy and a raw socket in the same rounds; latency of the first block
system   share of the transfer hidden behind prefill by prompt length, what the hand-off adds to
         the first decode step, the pause of a stream that moves to another worker, a fetched or
         restored prefix beside computing it

With --gpu the links are read beside the driver's own copy between the two GPUs, every tile of the
copying kernel is timed, and so is other work on both GPUs while blocks are read; the system serves
random weights of Llama-3.1-8B's shape with the tokenizer of DIR.

Prints tables of medians; every round is in the JSON under bench/results.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine
from bench.fabric import gpu
from bench.fabric.links import MEMCPY, RAW_SOCKET, LinkCase, LinkResult, measure_links

TRANSPORTS = ("nixl", "shm", "socket")
BLOCK_SIZES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
BATCH_BYTES = 64 << 20
POOL_BYTES = 256 << 20
"""Per pool: several times the last-level cache, so that blocks come from memory."""
TP_PAIRS = ((1, 2), (2, 1), (2, 2))
CPU_GOAL = 0.7
"""Of memcpy, for scattered blocks of 256 KiB and more."""


def link_cases() -> list[LinkCase]:
    cases = []
    for size in BLOCK_SIZES:
        cases += [LinkCase(size, count) for count in (1, BATCH_BYTES // size)]
    return [*cases, *(LinkCase(1 << 20, 2 * BATCH_BYTES >> 20, *pair) for pair in TP_PAIRS)]


def run_links(args: argparse.Namespace) -> list[LinkResult]:
    print(f"{'':32}" + "".join(f"{n:>18}" for n in (*TRANSPORTS, MEMCPY, RAW_SOCKET)), flush=True)
    results = []
    for number, case in enumerate(link_cases()):
        if time.monotonic() > args.until_s:
            print(f"  out of time, {case.label} and what follows left out")
            break
        result = measure_links(
            case, TRANSPORTS, pool_bytes=POOL_BYTES, rounds=args.rounds, seed=args.seed + number
        )
        results.append(result)
        print(_row(result), flush=True)
    return results


def _row(result: LinkResult) -> str:
    memcpy = result.median(MEMCPY)
    cells = [
        f"{result.median(name) / 1e9:9.2f} {result.median(name) / memcpy:7.2f}x"
        for name in (*TRANSPORTS, MEMCPY, RAW_SOCKET)
    ]
    latency = ", ".join(f"{k} {v * 1e6:.0f}" for k, v in result.latency_s.items())
    return f"{result.case.label:32}{''.join(cells)}   first block us: {latency}"


def print_verdicts(results: list[LinkResult]) -> None:
    best = min(
        (max(r.median(name) for name in ("nixl", "shm")) / r.median(MEMCPY), r.case.label)
        for r in results
        if r.case.num_blocks > 1
    )
    word = "reached" if best[0] >= CPU_GOAL else "MISSED"
    print(
        f"host memory, best of nixl and shm: at least {best[0]:.2f} of memcpy ({best[1]}): {word}"
    )


def plain(results: list[LinkResult]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.transfer", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=900.0, help="stop starting cases after")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--commit", help="names the tree where there is no git to ask")
    gpu.add_arguments(parser)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--links", action="store_true", help="the links alone")
    only.add_argument("--system", action="store_true", help="the running system alone")
    args = parser.parse_args()
    if args.gpu and not args.links and args.tokenizer is None:
        parser.error("--gpu needs --tokenizer, or --links alone")
    return args


def main() -> None:
    args = parse_args()
    args.until_s = time.monotonic() + args.budget_s
    about = machine.describe()
    about["commit"] = args.commit or about["commit"]
    result: dict[str, Any] = {"machine": about}
    if args.gpu:
        about |= machine.describe_gpu()
        run_on_gpus(args, result)
    else:
        run_on_cpu(args, result)
    name = "transfer-nvlink" if args.gpu else "transfer"
    path = machine.store(name, json.loads(json.dumps(result, default=str)), args.out)
    print(f"written to {path}")


def run_on_cpu(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if not args.system:
        links = run_links(args)
        print_verdicts(links)
        result["links"] = plain(links)
    if not args.links:
        from bench.fabric.system import run_system

        result["system"] = run_system(args)


def run_on_gpus(args: argparse.Namespace, result: dict[str, Any]) -> None:
    def keep(name: str, part: Any) -> None:
        result[name] = part

    if not args.system:
        gpu.run_links(args, keep)
    if not args.links:
        gpu.run_system(args, keep)


if __name__ == "__main__":
    main()
