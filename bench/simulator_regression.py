"""Three simulated scenarios that must stay within their bounds: the real policies, in virtual time.

A change of the router, the scheduler, the prefix cache, admission or the autoscaler shows here as
another figure. The same seed gives the same figures, so bounds are tight in both directions: what
became better wants new bounds, too.

    python -m bench.simulator_regression            about a minute; status 1 names what broke
    python -m bench.simulator_regression steady     one of them
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.simulator.arrivals import RequestLengths, conversations, sampled, sharing
from baton.simulator.cluster import SimCluster
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.outcome import Outcome
from baton.simulator.run_report import RunReport, run_report
from baton.simulator.workload import Arrival
from bench.autoscale import (
    LAYOUT,
    LENGTHS,
    MODEL,
    OBJECTIVE,
    check_nothing_aborted,
    day_of,
    ours,
    reversals_per_burst,
)
from services.planner.candidate import Candidate, Pool, cluster_of
from services.planner.elastic import ElasticRun
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo import SloTargets

TARGETS = SloTargets(OBJECTIVE.ttft_s, OBJECTIVE.itl_s)


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure must lie from `low` to `high`."""

    figure: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """`run(size)`: figures by name; `size` scales the work, 1 is what the bounds are for."""

    name: str
    what: str
    run: Callable[[float], dict[str, float | str]]
    bounds: tuple[Bound, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(s.name for s in SCENARIOS)}")
    parser.add_argument("--size", type=float, default=1.0, help="smaller is faster; no bounds then")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    known = {scenario.name: scenario for scenario in SCENARIOS}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(known)}")
    broken: list[str] = []
    told: dict[str, dict[str, float | str]] = {}
    for name in args.names or known:
        started_s = time.process_time()
        figures = told[name] = known[name].run(args.size)
        if not args.json:
            _print(known[name], figures, time.process_time() - started_s)
        if args.size == 1:
            broken += [f"{name}: {line}" for line in broken_bounds(known[name], figures)]
    if args.json:
        print(json.dumps(told, indent=1))
    for line in broken:
        print(f"BROKEN {line}", file=sys.stderr)
    sys.exit(1 if broken else 0)


def broken_bounds(scenario: Scenario, figures: dict[str, float | str]) -> list[str]:
    """One line for each figure that is out of its bounds."""
    lines = []
    for bound in scenario.bounds:
        value = figures[bound.figure]
        assert not isinstance(value, str)
        if not bound.low <= value <= bound.high:
            lines.append(
                f"{bound.figure} is {value:.4g}, must be from {bound.low:g} to {bound.high:g}"
            )
    return lines


def _print(scenario: Scenario, figures: dict[str, float | str], took_s: float) -> None:
    print(f"{scenario.name}: {scenario.what} ({took_s:.0f} s of CPU)")
    bounds = {bound.figure: bound for bound in scenario.bounds}
    for name, value in figures.items():
        if isinstance(value, str):
            continue
        bound = bounds.get(name)
        limits = f"from {bound.low:g} to {bound.high:g}" if bound else ""
        print(f"  {name:24} {value:12.4f}   {limits}")
    print(flush=True)


def _steady(size: float) -> dict[str, float | str]:
    """Poisson on eight workers; the first 60 % of each prompt is one of 40 texts."""
    lengths = (*LENGTHS, RequestLengths(3000, 90))
    arrivals = sharing(
        sampled(lengths, rate_per_s=38, num_requests=int(3000 * size), block_size=64, seed=1),
        num_prefixes=40,
        share=0.6,
        block_size=64,
    )
    candidate = Candidate(Pool(MODEL, 4), Pool(MODEL, 4), 2048)
    config = cluster_of(candidate, LAYOUT, 0)
    outcomes, report = _run(config, arrivals, num_devices=8)
    return _figures(outcomes, report)


def _bursts(size: float) -> dict[str, float | str]:
    """Twenty minutes for a day with two bursts of four times the traffic, after the autoscaler."""
    day_s = 1200 * size
    arrivals = day_of(day_s, 4.0, 2)
    candidate = Candidate(Pool(MODEL, 1), Pool(MODEL, 1), 2048)
    elastic = ElasticRun(
        cluster_of(candidate, LAYOUT, 0), ours(day_s), OBJECTIVE, start_s=15.0, interval_s=5.0
    )
    outcomes = elastic.run(arrivals)
    check_nothing_aborted(outcomes, arrivals)
    report = run_report(outcomes, elastic.busy_s, TARGETS, device_s=elastic.device_s)
    reversals = reversals_per_burst(elastic.samples, day_s)
    return {**_figures(outcomes, report), "reversals_per_burst": float(max(reversals))}


def _overload(size: float) -> dict[str, float | str]:
    """Conversations at about 1.5 times what four workers can take, admission in front."""
    rng = random.Random(3)
    turns = [
        [
            RequestLengths(rng.choice((200, 600, 1200)), rng.choice((30, 80, 160)))
            for _ in range(rng.randint(2, 5))
        ]
        for _ in range(200)
    ]
    arrivals = conversations(
        turns, rate_per_s=24, num_requests=int(3000 * size), block_size=64, think_s=8, seed=4
    )
    arrivals = [dataclasses.replace(a, targets=TARGETS) for a in arrivals]
    candidate = Candidate(Pool(MODEL, 2), Pool(MODEL, 2), 2048)
    layout = dataclasses.replace(LAYOUT, max_model_len=16_384)
    config = dataclasses.replace(
        cluster_of(candidate, layout, 0), admission=AdmissionConfig(), num_routers=2
    )
    outcomes, report = _run(config, arrivals, num_devices=4)
    admitted = [o for o in outcomes if o.refused_s is None]
    kept = run_report(admitted, {}, TARGETS).attainment
    return {**_figures(outcomes, report), "attainment_of_admitted": kept}


def _run(
    config: ClusterConfig, arrivals: Sequence[Arrival], *, num_devices: int
) -> tuple[list[Outcome], RunReport]:
    cluster = SimCluster(config)
    outcomes = cluster.run(arrivals)
    busy_s = {str(name): worker.busy_s for name, worker in cluster.workers.items()}
    return outcomes, run_report(outcomes, busy_s, TARGETS, num_devices=num_devices)


def _figures(outcomes: Sequence[Outcome], report: RunReport) -> dict[str, float | str]:
    summary = report.summary
    return {
        "requests": float(len(outcomes)),
        "attainment": report.attainment,
        "refused": report.refused_share,
        "goodput_per_s": report.goodput_per_s,
        "ttft_p50_s": summary.ttft_p50_s,
        "ttft_p90_s": summary.ttft_p90_s,
        "ttft_p99_s": summary.ttft_p99_s,
        "itl_p50_ms": 1000 * summary.itl_p50_s,
        "itl_p90_ms": 1000 * summary.itl_p90_s,
        "hit_rate": summary.hit_rate,
        "gpu_hours": report.device_hours,
        "digest": _digest(outcomes),
    }


def _digest(outcomes: Sequence[Outcome]) -> str:
    """Of all that happened to every request: equal for equal runs, in any process."""
    lines = [repr(dataclasses.astuple(outcome)) for outcome in outcomes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


SCENARIOS = (
    Scenario(
        "steady",
        "Poisson, shared prefixes, 4 prefill + 4 decode workers",
        _steady,
        (
            Bound("attainment", 0.93, 0.98),
            Bound("goodput_per_s", 34.5, 37.0),
            Bound("ttft_p50_s", 0.12, 0.17),
            Bound("ttft_p90_s", 0.29, 0.41),
            Bound("ttft_p99_s", 0.6, 1.1),
            Bound("itl_p90_ms", 27.0, 33.0),
            Bound("hit_rate", 0.52, 0.56),
            Bound("gpu_hours", 0.17, 0.19),
        ),
    ),
    Scenario(
        "bursts",
        "a day with two bursts, pools follow the autoscaler",
        _bursts,
        (
            Bound("attainment", 0.85, 0.95),
            Bound("ttft_p50_s", 0.10, 0.14),
            Bound("ttft_p90_s", 0.3, 0.6),
            Bound("itl_p90_ms", 33.0, 43.0),
            Bound("gpu_hours", 0.85, 1.1),
            Bound("reversals_per_burst", 0.0, 1.0),
        ),
    ),
    Scenario(
        "overload",
        "conversations at 1.5 times what is there, two routers, admission",
        _overload,
        (
            Bound("attainment_of_admitted", 0.97, 1.0),
            Bound("goodput_per_s", 11.5, 13.5),
            Bound("refused", 0.16, 0.24),
            Bound("ttft_p90_s", 0.35, 0.46),
            Bound("itl_p90_ms", 27.0, 33.0),
            Bound("hit_rate", 0.37, 0.43),
        ),
    ),
)


if __name__ == "__main__":
    main()
