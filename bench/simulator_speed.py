"""How many requests a minute the simulator does on one core, and in how much memory.

Each size runs in a process of its own. What counts is CPU time of the run itself, from the first
arrival to the last check; building the cluster is told beside it.

    python -m bench.simulator_speed --out bench/results
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.simulator.arrivals import RequestLengths, sampled
from baton.simulator.cluster import SimCluster
from bench.autoscale import LAYOUT, LENGTHS, MODEL
from bench.machine import describe, store
from services.planner.candidate import Candidate, Pool, cluster_of

SIZES = (16, 100, 1000)
LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Work:
    """What arrives, and how many requests a second for each worker of both pools together."""

    lengths: tuple[RequestLengths, ...]
    rate_per_worker: float
    prefill_share: float


WORKS = {
    "512/64": Work((RequestLengths(512, 64),), 4.0, 0.5),
    "300 to 1,800 / 30 to 160": Work(LENGTHS, 2.4, 0.625),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--workers", type=int, nargs="*", default=SIZES, metavar="N")
    parser.add_argument("--requests", type=int, metavar="N", help="of each run (6,000)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        name, workers, requests = args.one
        print(json.dumps(measure(WORKS[name], int(workers), int(requests))))
        return
    rows = []
    for workers in args.workers:
        for name in WORKS:
            row = {"work": name, **_in_a_process(name, workers, args.requests or 6000)}
            rows.append(row)
            print(
                f"{workers:5} workers, {name:26} {row['per_minute']:9,.0f} requests/min of CPU "
                f"time, built in {row['build_s']:.1f} s, {row['peak_mib']:,.0f} MiB",
                flush=True,
            )
    print(f"wrote {store('simulator-speed', {'machine': describe(), 'rows': rows}, args.out)}")


def _in_a_process(name: str, workers: int, requests: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.simulator_speed", "--one", name]
    done = subprocess.run(
        [*command, str(workers), str(requests)], capture_output=True, check=True, timeout=LIMIT_S
    )
    return dict(json.loads(done.stdout))


def measure(work: Work, num_workers: int, num_requests: int) -> dict[str, float]:
    """Of one run in this process."""
    num_prefill = round(work.prefill_share * num_workers)
    candidate = Candidate(Pool(MODEL, num_prefill), Pool(MODEL, num_workers - num_prefill), 2048)
    started_s = time.process_time()
    cluster = SimCluster(cluster_of(candidate, LAYOUT, 0))
    build_s = time.process_time() - started_s
    arrivals = sampled(
        work.lengths,
        rate_per_s=work.rate_per_worker * num_workers,
        num_requests=num_requests,
        block_size=LAYOUT.block_size,
    )
    started_s, wall_s = time.process_time(), time.perf_counter()
    outcomes = cluster.run(arrivals)
    cpu_s, wall_s = time.process_time() - started_s, time.perf_counter() - wall_s
    assert all(outcome.last_token_s for outcome in outcomes)
    return {
        "workers": num_workers,
        "requests": num_requests,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "build_s": build_s,
        "per_minute": 60 * num_requests / cpu_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
