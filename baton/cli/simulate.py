"""`baton simulate`: a cluster under a load, in virtual time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from baton.cli.planning_args import (
    add_machine_arguments,
    add_objective_arguments,
    add_workload_arguments,
    check_counts,
    layout_of,
    models_of,
    workload_of,
)
from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from baton.simulator.arrivals import Arrival
    from baton.simulator.cluster_config import ClusterConfig
    from baton.simulator.outcome import Outcome
    from services.planner.candidate import Candidate

EPILOG = """examples:
  baton simulate --model llama-3.1-8b --gpu h200 --prefill 2 --decode 2 \\
    --lengths 2048/256 --rate 20 --ttft 0.5 --itl 0.02
  baton simulate --model llama-3.1-70b --gpu h200 --prefill 4 --prefill-tp 4 \\
    --decode 4 --decode-tp 4 --trace conversation_trace.jsonl --rate 3 --ttft 5 --itl 0.05 \\
    --policy least_loaded --plot run.png

docs/planning.md explains what is simulated and how far to trust it."""
POLICIES = ("cost", "prefix_only", "least_loaded", "round_robin", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_machine_arguments(parser)
    cluster = parser.add_argument_group("the cluster")
    for pool, default in (("prefill", 1), ("decode", 1)):
        cluster.add_argument(
            f"--{pool}",
            type=int,
            default=default,
            metavar="N",
            help=f"{pool} workers (%(default)s)",
        )
        cluster.add_argument(
            f"--{pool}-tp", type=int, default=1, metavar="N", help="GPUs of each (%(default)s)"
        )
    cluster.add_argument(
        "--routers", type=int, default=1, metavar="N", help="copies of the router (%(default)s)"
    )
    cluster.add_argument(
        "--policy", choices=POLICIES, default="cost", help="placement (%(default)s)"
    )
    cluster.add_argument(
        "--no-admission",
        action="store_true",
        help="let everybody in, whatever it does to the targets",
    )
    cluster.add_argument(
        "--step-tokens", type=int, default=2048, metavar="N",
        help="prompt tokens in one step of a prefill worker (%(default)s)",
    )  # fmt: skip
    add_workload_arguments(parser)
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests per second; needed with lengths alone, "
        "otherwise the trace's own",
    )  # fmt: skip
    parser.add_argument(
        "--requests", type=int, default=2000, metavar="N", help="to simulate at most (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything drawn")
    add_objective_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="load and attainment over time, PNG"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """1 when the targets are missed."""
    from baton.cli.simulate_report import draw_run, print_run, run_json
    from baton.simulator.run_report import run_report
    from services.router.admission.slo import SloTargets

    check_counts(
        args,
        "block_size",
        "decode",
        "prefill_tp",
        "decode_tp",
        "routers",
        "requests",
        "step_tokens",
    )
    if args.prefill < 0:
        raise ConfigError(f"--prefill must not be negative, got {args.prefill}")
    config, candidate, arrivals = _setup(args)
    started_s = time.perf_counter()
    outcomes, busy_s = _simulate(config, arrivals)
    took_s = time.perf_counter() - started_s
    targets = SloTargets(args.ttft, args.itl)
    report = run_report(outcomes, busy_s, targets, num_devices=candidate.num_devices)
    if args.json:
        print(
            json.dumps({"cluster": candidate.name, **run_json(report), "took_s": took_s}, indent=1)
        )
    else:
        print_run(report, candidate.name, targets, took_s=took_s)
    if args.plot is not None:
        draw_run(args.plot, report)
    return 0 if report.attainment >= args.share else 1


def _setup(args: argparse.Namespace) -> tuple[ClusterConfig, Candidate, list[Arrival]]:
    from services.planner.candidate import Candidate, Pool, cluster_of
    from services.router.admission.admission_config import AdmissionConfig
    from services.router.admission.slo import SloTargets
    from services.router.placement.policy_config import PolicyConfig, PolicyName

    workload, block_size = workload_of(args)
    prefill, decode, kv_bytes = models_of(args, max(args.prefill_tp, args.decode_tp))
    for option, size, models in (
        ("--prefill-tp", args.prefill_tp, prefill),
        ("--decode-tp", args.decode_tp, decode),
    ):
        if size not in models:
            known = ", ".join(map(str, sorted(models)))
            raise ConfigError(
                f"{option} {size} is not among the sizes there are figures for: {known}"
            )
    candidate = Candidate(
        Pool(prefill[args.prefill_tp], args.prefill) if args.prefill else None,
        Pool(decode[args.decode_tp], args.decode),
        args.step_tokens,
    )
    policy = PolicyConfig(name=PolicyName(args.policy))
    layout = layout_of(workload, block_size, kv_bytes)
    config = dataclasses.replace(
        cluster_of(candidate, layout, args.seed, policy),
        num_routers=args.routers,
        admission=None if args.no_admission else AdmissionConfig(),
    )
    arrivals = workload.arrivals(args.rate, args.requests, args.seed)
    targets = SloTargets(args.ttft, args.itl)
    return config, candidate, [dataclasses.replace(a, targets=targets) for a in arrivals]


def _simulate(
    config: ClusterConfig, arrivals: list[Arrival]
) -> tuple[list[Outcome], dict[str, float]]:
    """Outcomes, and the busy seconds of each worker."""
    from rich.console import Console

    from baton.cli.progress import TerminalProgress
    from baton.model_import.progress import Unit
    from baton.simulator.cluster import SimCluster

    cluster = SimCluster(config)
    with TerminalProgress(Console(stderr=True)) as progress:
        progress.start_stage("simulating", len(arrivals), Unit.REQUESTS)
        outcomes = cluster.run(arrivals, progress=progress.update)
    return outcomes, {str(name): worker.busy_s for name, worker in cluster.workers.items()}
