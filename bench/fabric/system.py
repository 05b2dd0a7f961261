"""What requests feel of the fabric in a running `baton serve`, as clients and the router saw it.

hidden     fresh prompts of one to many chunks: share of the transfer behind prefill, and what the
           hand-off adds to the second token, beside the same engine colocated
migration  a long stream whose decode worker is told to end: the pause while it moves
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cpu.contender_system import START_TIMEOUT_S, RunningSystem, running_system
from bench.cpu.workload import PROMPT_LEN, prompts
from bench.stream import token_times

CHUNK_TOKENS = 512
"""Of the prefill pool's default."""
NUM_CHUNKS = (1, 2, 4, 8)
OUTPUT_TOKENS = 24
WARM_UP_PROMPTS = 4
WARM_UP_TOKENS = 4096
"""Together more than the pools hold."""
HIDDEN_GOAL = 0.95
HANDOFF_GOAL_S = 0.010
MIGRATED_PROMPT_TOKENS = 7000
MIGRATED_OUTPUT_TOKENS = 160
TOKENS_BEFORE_MOVE = 40
PAUSE_GOAL_S = 0.100
LOG_TIMEOUT_S = 10.0


@dataclass(slots=True)
class System:
    """A running `baton serve` and what its logs say."""

    running: RunningSystem
    folder: Path

    @property
    def port(self) -> int:
        return self.running.http_port

    def ended_requests(self) -> list[dict[str, Any]]:
        """The router's line for every request that has ended, in order."""
        text = (self.folder / "logs/router.log").read_text()
        return [json.loads(line) for line in text.splitlines() if '"request ended"' in line]

    def decode_pids(self) -> dict[str, int]:
        """Worker id -> process id, as the logs of the running workers say."""
        pids = {}
        for file in self.folder.glob("logs/decode*.log"):
            for line in file.read_text().splitlines():
                if '"pid"' in line and '"worker"' in line:
                    fields = json.loads(line)
                    pids[fields["worker"]] = int(fields["pid"])
        return pids


@contextmanager
def serving(*options: str, start_timeout_s: float = START_TIMEOUT_S) -> Iterator[System]:
    """`baton serve` with `options`, and its logs as long as it runs."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_system(
            *("--no-ray", "--run-dir", folder), *options, start_timeout_s=start_timeout_s
        ) as running,
    ):
        yield System(running, Path(folder))


def run_system(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "hidden": _run_hidden(args),
        "migration": _run_migration(args),
    }


def _run_hidden(args: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"\n{'prompt':>8}{'KV MB':>8}{'transfer ms':>13}{'exposed ms':>12}{'hidden':>9}"
          f"{'2nd token ms':>14}{'colocated':>11}{'added ms':>10}")  # fmt: skip
    rows = []
    with serving("--prefill", "1", "--decode", "1") as apart, serving("--prefill", "0") as together:
        for system in (apart, together):
            asyncio.run(_use_whole_pool(system, args.seed))
        for num_chunks in NUM_CHUNKS:
            row = _hidden_row(apart, together, num_chunks * CHUNK_TOKENS, args)
            rows.append(row)
            print(
                f"{row['prompt_tokens']:8}{row['bytes'] / 1e6:8.1f}{row['transfer_s'] * 1e3:13.2f}"
                f"{row['exposed_s'] * 1e3:12.2f}{row['hidden']:9.1%}"
                f"{row['second_token_s'] * 1e3:14.2f}{row['colocated_second_token_s'] * 1e3:11.2f}"
                f"{row['added_s'] * 1e3:10.2f}",
                flush=True,
            )
    late = [r for r in rows if r["prompt_tokens"] >= 2 * CHUNK_TOKENS]
    hidden, added = min(r["hidden"] for r in late), max(r["added_s"] for r in rows)
    print(f"hidden at two chunks and more: at least {hidden:.1%}: {reached(hidden >= HIDDEN_GOAL)}")
    print(f"hand-off adds at most {added * 1e3:.1f} ms: {reached(added <= HANDOFF_GOAL_S)}")
    return rows


async def _use_whole_pool(system: System, seed: int) -> None:
    """Memory that is written or mapped for the first time is slow: serve until none is."""
    for number in range(WARM_UP_PROMPTS):
        await token_times(system.port, random_prompt(WARM_UP_TOKENS, -seed * 100 - number - 1), 2)


def _hidden_row(
    apart: System, together: System, num_tokens: int, args: argparse.Namespace
) -> dict[str, Any]:
    gaps: dict[str, list[float]] = {"apart": [], "together": []}
    num_before = len(apart.ended_requests())
    for round_number in range(args.rounds):
        prompt = random_prompt(num_tokens, args.seed * 1000 + num_tokens + round_number)
        for name, system in (("apart", apart), ("together", together)):
            times = asyncio.run(token_times(system.port, prompt, OUTPUT_TOKENS))
            gaps[name].append(times[1] - times[0])
    ended = wait_for_ended(apart, num_before + args.rounds)[num_before:]
    return transfer_row(num_tokens, ended, gaps)


def transfer_row(
    num_tokens: int, ended: list[dict[str, Any]], gaps: dict[str, list[float]]
) -> dict[str, Any]:
    """Of prompts of one length: `ended` requests of the system with two workers, and the seconds
    from first to second token there ("apart") and colocated ("together")."""
    transfers = [r["kv_transfer_seconds"] for r in ended]
    exposed = [r["kv_transfer_exposed_seconds"] for r in ended]
    second = {name: statistics.median(values) for name, values in gaps.items()}
    return {
        "prompt_tokens": num_tokens,
        "bytes": ended[0]["kv_transfer_bytes"],
        "transfer_s": statistics.median(transfers),
        "exposed_s": statistics.median(exposed),
        "hidden": 1 - sum(exposed) / max(sum(transfers), 1e-9),
        "second_token_s": second["apart"],
        "colocated_second_token_s": second["together"],
        "added_s": second["apart"] - second["together"],
        "rounds": {"transfer_s": transfers, "exposed_s": exposed, "gaps_s": gaps},
    }


def wait_for_ended(system: System, count: int) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + LOG_TIMEOUT_S
    while len(ended := system.ended_requests()) < count:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{len(ended)} of {count} requests in the router's log")
        time.sleep(0.05)
    return ended


def _run_migration(args: argparse.Namespace) -> dict[str, Any]:
    """One long stream at a time; the worker that generates it gets SIGTERM in the middle."""
    print(f"\n{'context':>8}{'median gap ms':>15}{'longest gap ms':>16}{'pause ms':>10}")
    rounds = []
    options = ("--prefill", "1", "--decode", "2")
    with serving(*options) as system:
        for number in range(args.rounds):
            rounds.append(asyncio.run(_move_one(system, args.seed + number)))
            last = rounds[-1]
            print(
                f"{last['context_tokens']:8}{last['median_gap_s'] * 1e3:15.1f}"
                f"{last['longest_gap_s'] * 1e3:16.1f}{last['pause_s'] * 1e3:10.1f}",
                flush=True,
            )
            wait_for_workers(system, 2)
    pause_s = statistics.median(r["pause_s"] for r in rounds)
    goal = f"{PAUSE_GOAL_S * 1e3:.0f} ms, set for NVLink"
    print(f"pause, median of moves: {pause_s * 1e3:.1f} ms (goal {goal})")
    return {"pause_s": pause_s, "rounds": rounds}


async def _move_one(system: System, seed: int) -> dict[str, Any]:
    before = len(system.ended_requests())
    pids = system.decode_pids()
    prompt = random_prompt(MIGRATED_PROMPT_TOKENS, seed * 7919)

    def end_busiest() -> None:
        os.kill(pids[busiest(pids)], signal.SIGTERM)

    def on_token(number: int) -> None:
        if number == TOKENS_BEFORE_MOVE:
            threading.Thread(target=end_busiest).start()

    times = await token_times(system.port, prompt, MIGRATED_OUTPUT_TOKENS, on_token=on_token)
    if len(times) < MIGRATED_OUTPUT_TOKENS:
        raise RuntimeError(f"{len(times)} tokens of {MIGRATED_OUTPUT_TOKENS} came")
    gaps = [b - a for a, b in itertools.pairwise(times)]
    median = statistics.median(gaps)
    longest = max(gaps[TOKENS_BEFORE_MOVE - 2 :])
    ended = wait_for_ended(system, before + 1)[-1]
    return {
        "context_tokens": MIGRATED_PROMPT_TOKENS + TOKENS_BEFORE_MOVE,
        "num_tokens": len(times),
        "median_gap_s": median,
        "longest_gap_s": longest,
        "pause_s": longest - median,
        "moves": ended.get("migrations", []),
        "placements": len(ended["placements"]),
    }


def busiest(pids: dict[str, int]) -> str:
    """The worker that has computed most since a moment ago: it holds the only stream."""
    before = {name: _cpu_s(pid) for name, pid in pids.items()}
    time.sleep(0.2)
    return max(pids, key=lambda name: _cpu_s(pids[name]) - before[name])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_workers(system: System, count: int) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        alive = [pid for pid in system.decode_pids().values() if Path(f"/proc/{pid}").exists()]
        if len(alive) >= count:
            # The router connects within a second of a worker's announcement.
            time.sleep(2)
            return
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{len(alive)} decode workers came back, {count} expected")
        time.sleep(0.2)


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    """Fresh random tokens."""
    return [t for p in prompts(-(-num_tokens // PROMPT_LEN), seed=seed) for t in p][:num_tokens]


def reached(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"
