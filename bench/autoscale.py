"""A day of traffic with two bursts, under this autoscaler, Ray Serve's own and fixed pools.

Ray Serve's decisions come from its own functions, one deployment a pool; time and workers are
simulated for all alike, and nobody is refused. What counts is the share of requests that keep TTFT
and ITL, and the device hours paid for it, of workers that start and drain too.

    python -m bench.autoscale --out bench/results
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.core.worker_info import Role
from baton.simulator.arrivals import RequestLengths, unshared_chain
from baton.simulator.hardware import Hardware
from baton.simulator.outcome import Outcome
from baton.simulator.workload import Arrival
from bench.machine import describe, store
from services.planner.autoscale import Autoscaler, Observation
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.candidate import Candidate, Layout, Pool, cluster_of
from services.planner.elastic import ElasticRun, Sample, num_turns
from services.planner.objective import Objective, attainment
from services.planner.orders import OrderKind
from services.planner.pilots import Following, Ongoing, Pilot, by_count
from services.planner.pool_model import PoolModel

HARDWARE = Hardware(
    step_fixed_s=0.012,
    prefill_token_s=100e-6,
    prefill_pair_s=2e-9,
    decode_sequence_s=0.4e-3,
    decode_kv_token_s=2e-7,
    link_bytes_per_second=2e11,
)
MODEL = PoolModel(1, HARDWARE, 100_000, 30.0, "made up, of the size of a 13B model on one card")
LAYOUT = Layout(block_size=64, kv_bytes_per_token=800_000, max_model_len=4096)
LENGTHS = (RequestLengths(900, 60), RequestLengths(300, 160), RequestLengths(1800, 30))
OBJECTIVE = Objective(ttft_s=0.6, itl_s=0.04)
BURSTS = ((0.30, 0.34), (0.70, 0.74))
BURST = 4.0
MAX_WORKERS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--day", type=float, default=7200.0, metavar="S", help="length of the day")
    parser.add_argument("--rate", type=float, default=4.0, metavar="R", help="mean, without bursts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    arrivals = day_of(args.day, args.rate, args.seed)
    print(f"{len(arrivals)} requests in {args.day:.0f} s, bursts x{BURST:g} at {BURSTS}")
    rows = [
        run("baton", ours(args.day), arrivals, args.day),
        run("baton, roles change", ours(args.day, can_change_roles=True), arrivals, args.day),
    ]
    rows += [
        run(f"ray serve, {name}", by_count(RayScaler(*targets)), arrivals, args.day)
        for name, targets in (("its default of 2", (2.0, 2.0)), ("tuned", (2.0, 24.0)))
    ]
    rows += fixed_pools(rows[0]["device_s"] / rows[0]["span_s"], arrivals, args.day)
    result = {
        "machine": describe(),
        "requests": len(arrivals),
        "day_s": args.day,
        "objective": dataclasses.asdict(OBJECTIVE),
        "hardware": dataclasses.asdict(HARDWARE),
        "rows": rows,
    }
    print(f"wrote {store('autoscale', result, args.out)}")


def day_of(day_s: float, mean_rate: float, seed: int) -> list[Arrival]:
    """Quiet nights, a broad middle, two bursts; Poisson at that rate, by thinning."""
    rng = random.Random(seed)
    highest = 2 * mean_rate * BURST
    at_s, arrivals = 0.0, list[Arrival]()
    while (at_s := at_s + rng.expovariate(highest)) < day_s:
        if rng.random() * highest < rate_at(at_s / day_s, mean_rate):
            drawn = rng.choice(LENGTHS)
            number = len(arrivals)
            chain = unshared_chain(f"{seed}.{number}", drawn.num_prompt_tokens // 64)
            arrivals.append(
                Arrival(number, at_s, drawn.num_prompt_tokens, drawn.num_output_tokens, chain)
            )
    return arrivals


def rate_at(share_of_day: float, mean_rate: float) -> float:
    rate = mean_rate * (1 - 0.7 * math.cos(2 * math.pi * share_of_day))
    return rate * BURST if any(a < share_of_day < b for a, b in BURSTS) else rate


def ours(day_s: float, *, can_change_roles: bool = False) -> Pilot:
    limits = PoolLimits(1, MAX_WORKERS)
    config = AutoscaleConfig(
        OBJECTIVE.ttft_s,
        OBJECTIVE.itl_s,
        max_devices=2 * MAX_WORKERS,
        prefill=limits,
        decode=limits,
        # Two hours of burst in a real day, at the day's pace here.
        window_s=day_s / 48,
        forecast_s=MODEL.start_s,
        can_change_roles=can_change_roles,
    )
    return Following(Autoscaler(config, MODEL, MODEL), config)


class RayScaler:
    """Ray Serve's queue-length policy for each pool: its arithmetic, factors and delays."""

    def __init__(self, prefill_target: float, decode_target: float) -> None:
        from ray.serve.config import AutoscalingConfig

        self._pools = {
            role: _RayPool(
                AutoscalingConfig(
                    min_replicas=1, max_replicas=MAX_WORKERS, target_ongoing_requests=target
                )
            )
            for role, target in ((Role.PREFILL, prefill_target), (Role.DECODE, decode_target))
        }

    def __call__(self, seen: Observation, ongoing: Ongoing) -> tuple[int, int]:
        prefill, decode = self._pools[Role.PREFILL], self._pools[Role.DECODE]
        return (
            prefill.decide(seen.now_s, ongoing.num_prefill, seen.prefill.num_ready),
            decode.decide(seen.now_s, ongoing.num_decode, seen.decode.num_ready),
        )


class _RayPool:
    def __init__(self, config: Any) -> None:
        self._config, self._target = config, 1
        self._state: dict[str, Any] = {}
        self._seen: list[tuple[float, float]] = []

    def decide(self, now_s: float, num_ongoing: int, num_ready: int) -> int:
        from ray.serve import autoscaling_policy as policy

        self._seen.append((now_s, num_ongoing))
        since_s = now_s - self._config.look_back_period_s
        self._seen = [(at_s, num) for at_s, num in self._seen if at_s > since_s]
        mean = sum(num for _, num in self._seen) / len(self._seen)
        current = max(1, num_ready)
        desired = mean / self._config.get_target_ongoing_requests()
        scaled = policy._apply_scaling_factors(desired, current, self._config)
        bounded = max(1, min(MAX_WORKERS, scaled))
        self._target, self._state = policy._apply_delay_logic(
            bounded, self._target, self._config, self._state, _now=now_s
        )
        return self._target


def fixed_pools(devices: float, arrivals: Sequence[Arrival], day_s: float) -> list[dict[str, Any]]:
    """Of as many devices as ours took on average, rounded up: every split, the best one told."""
    total = math.ceil(devices)
    # Prompts take most of the time here; with fewer prefill workers the queue only grows.
    splits = [(p, total - p) for p in range(max(1, total // 2), total)]
    rows = [
        run(
            f"fixed {p}:{d}",
            by_count(lambda seen, ongoing, p=p, d=d: (p, d)),  # type: ignore[misc]
            arrivals,
            day_s,
            start=(p, d),
        )
        for p, d in splits
    ]
    return [max(rows, key=lambda row: row["both"])]


def run(
    name: str,
    pilot: Pilot,
    arrivals: Sequence[Arrival],
    day_s: float,
    *,
    start: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    candidate = Candidate(Pool(MODEL, start[0]), Pool(MODEL, start[1]), 2048)
    elastic = ElasticRun(cluster_of(candidate, LAYOUT, 0), pilot, OBJECTIVE, start_s=MODEL.start_s)
    started_s = time.perf_counter()
    outcomes = elastic.run(arrivals)
    reached = attainment(outcomes, OBJECTIVE)
    row = {
        "name": name,
        **dataclasses.asdict(reached),
        "device_s": elastic.device_s,
        "device_hours": elastic.device_s / 3600,
        "span_s": max(o.last_token_s for o in outcomes),
        "ttft_p99_s": _percentile([o.ttft_s for o in outcomes], 0.99),
        "reversals": reversals_per_burst(elastic.samples, day_s),
        "role_changes": sum(o.order.kind is OrderKind.CHANGE_ROLE for o in elastic.orders),
        "took_s": time.perf_counter() - started_s,
        "samples": [dataclasses.astuple(sample) for sample in elastic.samples],
    }
    check_nothing_aborted(outcomes, arrivals)
    print(
        f"  {name:28} kept {reached.both:.3f} (TTFT {reached.ttft:.3f}, ITL {reached.itl:.3f})  "
        f"{row['device_hours']:.2f} device hours  reversals a burst {row['reversals']}  "
        f"{row['role_changes']} role changes  {row['took_s']:.0f} s",
        flush=True,
    )
    return row


def check_nothing_aborted(outcomes: Sequence[Outcome], arrivals: Sequence[Arrival]) -> None:
    """Raises AssertionError when a request did not get all its tokens."""
    for outcome, arrival in zip(outcomes, arrivals, strict=True):
        assert outcome.num_output_tokens == arrival.num_output_tokens


def reversals_per_burst(samples: Sequence[Sample], day_s: float) -> list[int]:
    """Changes of direction of each pool from the start of a burst to a burst's length after its
    end; more of both pools."""
    counts = []
    for start, end in BURSTS:
        until = end + (end - start)
        inside = [s for s in samples if start * day_s <= s.now_s <= until * day_s]
        counts.append(max(num_turns(inside, role) for role in Role))
    return counts


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
