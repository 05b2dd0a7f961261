"""A conversation trace through the real policies, index, schedulers and block pools, by policy.

What a policy gains is hit rate and TTFT beside the others in one run, and beside two oracles: one
cache of unlimited size, and one with the memory of all prefill workers together (least recently
used goes first). Seconds are virtual; they come from `baton.simulator.hardware`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.core.block import BlockHash
from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.outcome import summarize
from baton.simulator.workload import MOONCAKE_BLOCK_SIZE, Arrival, read_mooncake
from services.router.placement.policy_config import PolicyConfig, PolicyName

POLICIES = (
    PolicyName.COST,
    PolicyName.PREFIX_ONLY,
    PolicyName.LEAST_LOADED,
    PolicyName.ROUND_ROBIN,
    PolicyName.RANDOM,
)
COPIES = (1, 2)


def run_replay(args: argparse.Namespace) -> dict[str, Any]:
    """Raises SystemExit when there is no trace."""
    if args.trace is None:
        print("  left out: no trace given (--trace FILE, JSON lines of the Mooncake format)")
        return {"left_out": "no trace given"}
    trace: Path = args.trace
    arrivals = read_mooncake(trace, limit=args.requests)
    config = ClusterConfig(seed=args.seed)
    result: dict[str, Any] = {
        "trace": trace.name,
        "num_requests": len(arrivals),
        "cluster": dataclasses.asdict(dataclasses.replace(config, policy=PolicyConfig())),
        "oracle_unlimited": oracle_hit_rate(arrivals, None),
        "oracle_same_memory": oracle_hit_rate(arrivals, config.num_prefill * config.num_blocks),
        "policies": [],
    }
    result["cluster"]["policy"] = None
    print(
        f"hit rate of one cache: unlimited {result['oracle_unlimited']:.3f}, "
        f"with the same memory {result['oracle_same_memory']:.3f}"
    )
    for name in POLICIES:
        for num_routers in COPIES if name is PolicyName.COST else (1,):
            result["policies"].append(_replay(arrivals, config, name, num_routers))
    return result


def oracle_hit_rate(arrivals: Sequence[Arrival], num_blocks: int | None) -> float:
    """Of one cache that sees all requests in order; `num_blocks` None: it forgets nothing."""
    cache: OrderedDict[BlockHash, None] = OrderedDict()
    num_hit = num_tokens = 0
    for arrival in arrivals:
        num_cached = 0
        for block_hash in arrival.block_hashes:
            if block_hash not in cache:
                break
            num_cached += 1
        # The last prompt token is always computed.
        num_hit += min(num_cached * MOONCAKE_BLOCK_SIZE, arrival.num_prompt_tokens - 1)
        num_tokens += arrival.num_prompt_tokens
        for block_hash in reversed(arrival.block_hashes):
            cache[block_hash] = None
            cache.move_to_end(block_hash)
        while num_blocks is not None and len(cache) > num_blocks:
            cache.popitem(last=False)
    return num_hit / max(1, num_tokens)


def _replay(
    arrivals: Sequence[Arrival], config: ClusterConfig, name: PolicyName, num_routers: int
) -> dict[str, Any]:
    config = dataclasses.replace(config, policy=PolicyConfig(name=name), num_routers=num_routers)
    started_s = time.perf_counter()
    cluster = SimCluster(config)
    summary = summarize(cluster.run(arrivals))
    busy = [worker.busy_s / summary.span_s for worker in cluster.workers.values()]
    row = {
        "policy": name.value,
        "num_routers": num_routers,
        **dataclasses.asdict(summary),
        "prefill_busy": sum(busy[: config.num_prefill]) / config.num_prefill,
        "decode_busy": sum(busy[config.num_prefill :]) / config.num_decode,
        "took_s": time.perf_counter() - started_s,
    }
    print(
        f"  {name.value:13} x{num_routers}  hit {summary.hit_rate:.3f} "
        f"(fetched {summary.fetched_rate:.3f})  TTFT mean {summary.ttft_mean_s:.3f} "
        f"p50 {summary.ttft_p50_s:.3f} p99 {summary.ttft_p99_s:.2f} s  "
        f"ITL {1000 * summary.itl_mean_s:.1f} ms  took {row['took_s']:.0f} s",
        flush=True,
    )
    return row
