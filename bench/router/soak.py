"""Whether the prefix index stays as large as it is: mixed events at its bound, and its memory.

Chains of new blocks are stored on a hundred workers, used again, matched and removed, many times
over what the index may hold. Memory is looked at after every hundredth part.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from bench.router.index_child import rss_bytes
from bench.router.index_workload import HASH_BYTES, split
from services.router.index.prefix_index import PrefixIndex

MAX_ENTRIES = 1_000_000
NUM_WORKERS = 100
CHAIN_BLOCKS = 64
MAX_CHAINS = 20_000
"""Held by workers: more blocks than the index may hold."""
MATCH_EVERY = 10
NUM_SAMPLES = 100
SETTLED_SHARE = 0.1
"""Of all events, after which memory counts."""


def run_soak(args: argparse.Namespace) -> dict[str, Any]:
    return soak(args.soak_events, args.soak_s, seed=args.seed)


def soak(
    num_events: int, limit_s: float, *, seed: int = 0, max_entries: int = MAX_ENTRIES
) -> dict[str, Any]:
    """An event: a hash stored, removed or marked as used. Ends early after `limit_s`."""
    flow = Flow(random.Random(seed), max_entries)
    samples: list[dict[str, float]] = []
    start, cpu_start = time.monotonic(), time.process_time()
    while flow.num_events < num_events and time.monotonic() - start < limit_s:
        until = num_events * (len(samples) + 1) // NUM_SAMPLES
        while flow.num_events < until:
            flow.step()
        sample = {
            "events": flow.num_events,
            "seconds": round(time.monotonic() - start, 1),
            "rss_mb": round(rss_bytes() / 1e6, 2),
            "entries": len(flow.index),
        }
        samples.append(sample)
        if len(samples) % 5 == 0:
            print(f"  {sample}", flush=True)
    cpu_s = time.process_time() - cpu_start
    flow.index.check_integrity()
    settled = [s["rss_mb"] for s in samples if s["events"] >= SETTLED_SHARE * num_events]
    result: dict[str, Any] = {
        "events": flow.num_events,
        "matches": flow.num_matches,
        "events_per_cpu_s": round(flow.num_events / cpu_s),
        "rss_mb_after_a_tenth": settled[0] if settled else None,
        "rss_mb_at_most_later": max(settled, default=None),
        "rss_mb_at_the_end": samples[-1]["rss_mb"],
    }
    print(f"  {result}", flush=True)
    return {**result, "samples": samples}


class Flow:
    """What happens to one index."""

    def __init__(self, rng: random.Random, max_entries: int) -> None:
        self.index = PrefixIndex(max_entries, max_pending=1024)
        self.num_events = self.num_matches = 0
        self._rng = rng
        self._number = 0
        self._held: list[tuple[str, bytes]] = []

    def step(self) -> None:
        rng, held = self._rng, self._held
        worker, chain = f"w{self._number % NUM_WORKERS}", rng.randbytes(CHAIN_BLOCKS * HASH_BYTES)
        self.index.store(worker, chain)
        held.append((worker, chain))
        used = held[rng.randrange(len(held))][1]
        self.index.touch(used)
        self.num_events += 2 * CHAIN_BLOCKS
        if len(held) > MAX_CHAINS:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            self.index.remove(*held.pop())
            self.num_events += CHAIN_BLOCKS
        if self._number % MATCH_EVERY == 0:
            self.index.match(split(used))
            self.num_matches += 1
        self._number += 1
