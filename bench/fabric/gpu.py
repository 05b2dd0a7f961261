"""All that is measured between two GPUs, for `bench.transfer`: links, the kernel, the system."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.fabric.gpu_links import Bench, GpuLinkCase, GpuLinkResult, PeerCopy, measure_cases
from bench.fabric.gpu_owner import GpuOwner

ARENA_BYTES = 4 << 30
PEAK_BYTES = 1 << 30
OWNER_DEVICE, READER_DEVICE = 0, 1
BATCH_BYTES = 1 << 30
LARGE_BATCH_BYTES = 3 << 30
GOAL = 0.9
"""Of the driver's copy between the two GPUs, for scattered blocks of 256 KiB and more."""
SLOW_DOWN_GOAL = 0.05
HIDDEN_GOAL = 0.95
ADDED_GOAL_S = 0.002
PAUSE_GOAL_S = 0.100
NUM_MOVES = 3
INTERFERENCE_ROUNDS = 3
TOP = 3
"""Rows of a sweep that are printed."""

Keep = Callable[[str, Any], None]
"""Called with the name of a part and its result as soon as there is one."""


def gpu_cases() -> list[GpuLinkCase]:
    """The most telling ones first."""
    equal = [
        GpuLinkCase(size, BATCH_BYTES)
        for size in (2 << 20, 256 << 10, 8 << 20, 32 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
    ]
    unequal = [
        GpuLinkCase(size, BATCH_BYTES, *pair)
        for pair in ((1, 2), (2, 1), (2, 2), (1, 4), (4, 1))
        for size in (2 << 20, 512 << 10)
    ]
    split = [
        GpuLinkCase(2 << 20, BATCH_BYTES, owner_block_size=16, reader_block_size=64),
        GpuLinkCase(2 << 20, BATCH_BYTES, owner_block_size=64, reader_block_size=16),
    ]
    sizes = [
        GpuLinkCase(2 << 20, size)
        for size in (2 << 20, 32 << 20, 128 << 20, 512 << 20, LARGE_BATCH_BYTES)
    ]
    return [*equal, *unequal, *split, *sizes]


def open_bench(seed: int) -> tuple[GpuOwner, Callable[[], Bench]]:
    """The owner starts at once; the call makes the reader's side."""
    import torch

    from bench.fabric.gpu_pool import make_arena

    owner = GpuOwner(device_id=OWNER_DEVICE, arena_bytes=ARENA_BYTES, seed=seed)

    def make() -> Bench:
        devices = [torch.device("cuda", index) for index in (OWNER_DEVICE, READER_DEVICE)]
        torch.cuda.set_device(devices[1])
        arena = make_arena(ARENA_BYTES, devices[1], seed=None)
        return Bench(owner, arena, PeerCopy(PEAK_BYTES, *devices), seed)

    return owner, make


def run_links(args: argparse.Namespace, keep: Keep) -> None:
    owner, make = open_bench(args.seed)
    with owner:
        bench = make()
        print(f"{'':48}{'read GB/s':>10}{'moved':>8}{'peak':>8}{'share':>8}{'1 block us':>12}"
              f"{'connect s':>11}")  # fmt: skip
        results = []
        for result in measure_cases(
            bench, gpu_cases(), rounds=args.rounds, seed=args.seed, until_s=args.until_s
        ):
            results.append(result)
            print(_row(result), flush=True)
            keep("gpu_links", [asdict(one) for one in results])
        run_kernel(bench, args, keep)


def _row(result: GpuLinkResult) -> str:
    read, moved, peak = (
        statistics.median(rates) / 1e9 for rates in (result.read, result.moved, result.peak)
    )
    return (
        f"{result.case.label:48}{read:10.1f}{moved:8.1f}{peak:8.1f}{result.share:8.2f}"
        f"{result.latency_s * 1e6:12.0f}{result.connect_s:11.2f}"
    )


def run_kernel(bench: Bench, args: argparse.Namespace, keep: Keep) -> None:
    from bench.fabric.gpu_kernel import (
        MAX_PROGRAMS,
        SWEPT_CASES,
        measure_interference,
        measure_launches,
        sweep,
    )

    launches = measure_launches(bench, rounds=args.rounds, seed=args.seed)
    keep("gpu_launches", launches)
    print_launches(launches)
    interference = measure_interference(bench, rounds=INTERFERENCE_ROUNDS, seed=args.seed)
    keep("gpu_interference", interference)
    print_interference(interference, MAX_PROGRAMS)
    swept = []
    for case in SWEPT_CASES:
        if time.monotonic() > args.until_s:
            print(f"out of time, sweep of {case.label} and what follows left out")
            break
        ranking = sweep(bench, case, rounds=args.rounds, seed=args.seed)
        swept += [asdict(one) | {"is_default": one.is_default} for one in ranking]
        keep("gpu_sweep", swept)
        for one in [*ranking[:TOP], *(o for o in ranking[TOP:] if o.is_default)]:
            mark = " (default)" if one.is_default else ""
            print(
                f"{case.label:48}{one.rate / 1e9:8.1f} GB/s: {one.tile.num_bytes} bytes, "
                f"{one.tile.num_warps} warps, {one.max_programs} programs{mark}",
                flush=True,
            )


def print_launches(rows: list[dict[str, Any]]) -> None:
    shares = []
    for row in rows:
        kernel, driver = (statistics.median(row[name]) for name in ("kernel", "driver"))
        print(
            f"blocks of {row['block_bytes'] >> 10} KiB, {row['launch_bytes'] >> 20} MiB a launch: "
            f"{kernel / 1e9:.1f} GB/s, the driver's copy {driver / 1e9:.1f}: {kernel / driver:.2f}",
            flush=True,
        )
        shares.append(kernel / driver)
    print(
        f"kernel, scattered blocks of 256 KiB and more: at least {min(shares):.2f} of a copy of as "
        f"many bytes: {_word(min(shares) >= GOAL)}"
    )


def print_interference(rows: list[dict[str, Any]], max_programs: int) -> None:
    """`max_programs`: of a read's copy."""
    for row in rows:
        alone = statistics.median(row["alone"])
        for width, pairs in row["beside"].items():
            rate, copied = (statistics.median(values) for values in zip(*pairs, strict=True))
            loss = 1 - rate / alone
            is_goal = row["work"].startswith("owner") and width == max_programs
            verdict = f": {_word(loss <= SLOW_DOWN_GOAL)}" if is_goal else ""
            who = f"{width} programs" if isinstance(width, int) else f"the {width}'s copy"
            rates = f"{loss:.1%} slower beside {who} at {copied / 1e9:.0f} GB/s"
            print(f"{row['work']}: {rates}{verdict}", flush=True)


def run_system(args: argparse.Namespace, keep: Keep) -> None:
    from bench.fabric import gpu_system

    with gpu_system.both_serving(args.tokenizer) as systems:
        measure_system(systems, args, keep)


def measure_system(systems: Any, args: argparse.Namespace, keep: Keep) -> None:
    from bench.fabric import gpu_system

    keep("gpu_system_start_s", systems.start_s)
    print(f"ready after {systems.start_s} s", flush=True)
    print(gpu_system.HIDDEN_HEADER)
    rows, moves = [], []
    for num_tokens, rounds in gpu_system.PROMPTS:
        rows.append(gpu_system.hidden_row(systems, num_tokens, rounds, args.seed))
        keep("gpu_hidden", rows)
        print(gpu_system.row_text(rows[-1]), flush=True)
    for number in range(NUM_MOVES):
        moves.append(gpu_system.move_once(systems, args.seed + number))
        keep("gpu_migration", moves)
        print(gpu_system.move_text(moves[-1]), flush=True)
    for num_tokens, rounds in gpu_system.LONG_PROMPTS:
        rows.append(gpu_system.hidden_row(systems, num_tokens, rounds, args.seed))
        keep("gpu_hidden", rows)
        print(gpu_system.row_text(rows[-1]), flush=True)
    _system_verdicts(rows, moves, gpu_system.CHUNK_TOKENS)


def _system_verdicts(
    rows: list[dict[str, Any]], moves: list[dict[str, Any]], chunk_tokens: int
) -> None:
    late = [r["hidden"] for r in rows if r["prompt_tokens"] >= 2 * chunk_tokens]
    added = max(r["added_s"] for r in rows)
    pause = max(m["pause_s"] for m in moves)
    print(f"hidden at two chunks and more: at least {min(late):.1%}: "
          f"{_word(min(late) >= HIDDEN_GOAL)}")  # fmt: skip
    print(f"hand-off adds at most {added * 1e3:.2f} ms: {_word(added <= ADDED_GOAL_S)}")
    print(f"longest pause of a move: {pause * 1e3:.1f} ms: {_word(pause <= PAUSE_GOAL_S)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", action="store_true", help="between two GPUs of this machine")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="--gpu: a folder with tokenizer.json"
    )


def _word(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"
