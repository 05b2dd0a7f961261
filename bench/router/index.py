"""The prefix index: inserts, matches and memory beside Dynamo's radix tree, and what a bound costs.

Both run in turn, each in fresh processes, on the same chains; medians over the rounds. Alone ours
is then filled by events of several sizes, to ten million blocks and beyond its bound, and its
lengths are compared with a walk over every block where workers and the bound evict.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.router.index_child import rss_bytes
from bench.router.index_workload import HASH_BYTES, Workload, percentile, split
from services.router.index.prefix_index import PrefixIndex

CHILD = Path(__file__).with_name("index_child.py")
CHILD_TIMEOUT_S = 300
WORKLOADS = (
    Workload("1M blocks, each on one worker", 1_000_000),
    Workload("100k blocks, each on ten workers", 100_000, num_holders=10),
)
GOALS = {"match_full_p50_us": 20.0, "bytes_per_block": 60.0, "insert_blocks_per_cpu_s": 1e6}
NUM_WORKERS = 100
BATCHES = (1, 8, 64, 512)
SNAPSHOT_BLOCKS = 100_000
LARGE_ENTRIES = 10_000_000


def run_index(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"goals": GOALS, "beside": _beside(args.dynamo, args.rounds)}
    result["batches"] = batches()
    result["wrong_lengths"] = [wrong_lengths(share) for share in (1.5, 1.0, 0.5)]
    result["bound"] = bound(LARGE_ENTRIES)
    for name in ("batches", "wrong_lengths", "bound"):
        print(f"{name}: {json.dumps(result.get(name))}", flush=True)
    return result


def _beside(dynamo: Path | None, rounds: int) -> dict[str, Any]:
    """Medians by workload and contender."""
    contenders = {"baton": Path(sys.executable)}
    result: dict[str, Any] = {"left_out": []}
    if dynamo is None:
        result["left_out"].append("dynamo: no environment given (--dynamo PYTHON)")
    else:
        contenders["dynamo"] = dynamo
    for workload in WORKLOADS:
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _, (name, python) in itertools.product(range(rounds), contenders.items()):
            samples[name].append(_child(python, name, workload))
        rows = {
            name: {key: statistics.median(s[key] for s in runs) for key in runs[0]}
            for name, runs in samples.items()
        }
        result[workload.name] = {"medians": rows, "rounds": samples}
        print(f"{workload.name} ({workload.num_distinct} distinct)")
        for key in rows["baton"]:
            print(f"  {key:28}" + "".join(f"{n:>10} {row[key]:12.4g}" for n, row in rows.items()))
    return result


def _child(python: Path, contender: str, workload: Workload) -> dict[str, float]:
    order = json.dumps({"contender": contender, "workload": asdict(workload)})
    done = subprocess.run(
        [str(python), str(CHILD), order],
        capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{contender} failed: {done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def batches(num_blocks: int = 300_000, max_entries: int = 1_000_000) -> dict[str, float]:
    """Blocks per processor second by blocks per event, into an index at its bound; a snapshot."""
    rng = random.Random(1)
    index = PrefixIndex(max_entries, max_pending=1024)
    _fill(index, max_entries * 11 // 10, rng)
    rates = {}
    for size in BATCHES:
        events = [rng.randbytes(size * HASH_BYTES) for _ in range(num_blocks // size)]
        start = time.process_time()
        for event, worker in zip(events, itertools.cycle(range(NUM_WORKERS)), strict=False):
            index.store(f"w{worker}", event)
        index.flush()
        rates[f"events_of_{size}"] = len(events) * size / (time.process_time() - start)
    snapshot = rng.randbytes(SNAPSHOT_BLOCKS * HASH_BYTES)
    start = time.process_time()
    index.reset_worker("w0", {})
    index.store("w0", snapshot)
    index.flush()
    rates["snapshot"] = SNAPSHOT_BLOCKS / (time.process_time() - start)
    return rates


def bound(max_entries: int) -> dict[str, float]:
    """Filled to a quarter beyond its bound: memory, and matches of what is held."""
    rng = random.Random(2)
    before = rss_bytes()
    index = PrefixIndex(max_entries, max_pending=1024)
    start = time.process_time()
    last = _fill(index, max_entries * 5 // 4, rng)
    cpu_s = time.process_time() - start
    # Surely held: they are less than a quarter of all.
    prompts = [tuple(split(chain)) for chain in last[-max(1, max_entries // 4096) :]]
    times_us = []
    for prompt in prompts:
        start = time.perf_counter()
        match = index.match(prompt)
        times_us.append((time.perf_counter() - start) * 1e6)
        assert match.lengths.max() == len(prompt)
    assert len(index) == max_entries
    return {
        "entries": len(index),
        "bytes_per_block": (rss_bytes() - before) / len(index),
        "insert_blocks_per_cpu_s": max_entries * 5 // 4 / cpu_s,
        "match_full_p50_us": percentile(times_us, 0.5),
    }


def _fill(index: PrefixIndex, num_blocks: int, rng: random.Random) -> list[bytes]:
    """Chains of 512 on changing workers; the last ones."""
    kept: list[bytes] = []
    for number in range(-(-num_blocks // 512)):
        chain = rng.randbytes(512 * HASH_BYTES)
        index.store(f"w{number % NUM_WORKERS}", chain)
        kept.append(chain)
        del kept[:-200]
    index.flush()
    return kept


def wrong_lengths(bound_share: float, *, num_turns: int = 8000) -> dict[str, float]:
    """How often a length found by halves differs from a walk, and by how much.

    Conversations grow on 20 workers whose pools keep what was used last, ends of chains first. The
    index holds `bound_share` of what all pools can hold: below 1 it has to drop blocks itself.
    """
    rng = random.Random(4)
    num_workers, pool_blocks = 20, 2000
    index = PrefixIndex(int(bound_share * num_workers * pool_blocks))
    pools: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(num_workers)]
    system = split(rng.randbytes(20 * HASH_BYTES))
    talks = [[*system, *split(rng.randbytes(30 * HASH_BYTES))] for _ in range(500)]
    num_lengths = num_wrong = num_blocks_off = num_too_short = 0
    for _ in range(num_turns):
        number = rng.randrange(len(talks)) if rng.random() < 0.5 else rng.randrange(50)
        chain = talks[number]
        exact, found = index.match_exactly(chain).lengths[0], index.match(chain).lengths[0]
        num_lengths += int(((exact > 0) | (found > 0)).sum())
        num_wrong += int((exact != found).sum())
        num_blocks_off += int(abs(exact - found).sum())
        num_too_short += int((found < exact).sum())
        worker = (number if rng.random() < 0.7 else rng.randrange(num_workers)) % num_workers
        index.touch(chain)
        grown = split(rng.randbytes(rng.randrange(1, 12) * HASH_BYTES))
        talks[number] = [*chain, *grown] if len(chain) < 400 else [*system, *grown]
        _use(index, f"w{worker}", pools[worker], talks[number], pool_blocks)
    return {
        "bound_share": bound_share,
        "lengths": num_lengths,
        "wrong_share": num_wrong / num_lengths,
        "too_short_share": num_too_short / num_lengths,
        "blocks_off_when_wrong": num_blocks_off / num_wrong if num_wrong else 0.0,
    }


def _use(
    index: PrefixIndex,
    worker: str,
    pool: OrderedDict[bytes, None],
    chain: list[bytes],
    pool_blocks: int,
) -> None:
    """The worker computes `chain`: what it lacks is stored, its oldest blocks go."""
    stored = [h for h in chain if h not in pool]
    for block_hash in reversed(chain):
        pool[block_hash] = None
        pool.move_to_end(block_hash)
    removed = [pool.popitem(last=False)[0] for _ in range(len(pool) - pool_blocks)]
    index.remove(worker, b"".join(removed))
    index.store(worker, b"".join(stored))
