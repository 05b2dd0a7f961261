"""`baton simulate`: a cluster under a load, in virtual time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from baton.cli.planning_args import (
    add_machine_arguments,
    add_objective_arguments,
    add_workload_arguments,
    arrivals_of,
    check_counts,
    layout_of,
    models_of,
    rates_of,
    workload_of,
)
from baton.cli.simulate_autoscale import add_autoscale_arguments, run_autoscaled
from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from baton.simulator.arrivals import Arrival
    from baton.simulator.cluster_config import ClusterConfig
    from baton.simulator.run_report import RunReport
    from services.planner.candidate import Candidate
    from services.planner.objective import Objective
    from services.planner.workload import Workload

EPILOG = """examples:
  baton simulate --model llama-3.1-8b --gpu h200 --prefill 2 --decode 2 \\
    --lengths 2048/256 --rate 20 --ttft 0.5 --itl 0.02
  baton simulate --model llama-3.1-70b --gpu h200 --prefill 4 --prefill-tp 4 \\
    --decode 4 --decode-tp 4 --trace conversation_trace.jsonl --rate 3 --ttft 5 --itl 0.05 \\
    --policy least_loaded --plot run.png
  baton simulate --model llama-3.1-8b --gpu h200 --lengths 2048/256 --ttft 0.5 --itl 0.02 \\
    --sweep 5:40:8 --plot sweep.png
  baton simulate --model llama-3.1-8b --gpu h200 --lengths 2048/256 --ttft 0.5 --itl 0.02 \\
    --rate 0:5,600:30,900:5 --seconds 1800 --autoscale --max-gpus 8 --plot day.png

docs/planning.md explains what is simulated and how far to trust it."""
POLICIES = ("cost", "prefix_only", "least_loaded", "round_robin", "random")
DEFAULT_REQUESTS = 2000
PROGRESS_STEP = 64
"""Requests between two looks at the progress bar: drawing costs more than simulating one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_machine_arguments(parser)
    _add_cluster_arguments(parser.add_argument_group("the cluster"))
    add_workload_arguments(parser)
    parser.add_argument(
        "--rate", metavar="R|S:R,...", help="requests per second, or from second S on; needed with "
        "lengths alone, otherwise the trace's own",
    )  # fmt: skip
    parser.add_argument(
        "--requests", type=int, metavar="N",
        help=f"to simulate at most ({DEFAULT_REQUESTS}; with --seconds as many as come)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of arrivals; needed with a rate that changes"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything drawn")
    add_objective_arguments(parser)
    add_autoscale_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--sweep", metavar="R,R,...|LOW:HIGH:N",
        help="one run at each of these rates: goodput against rate",
    )  # fmt: skip
    output.add_argument(
        "--price", type=float, metavar="X", help="of one GPU hour, to say what the run costs"
    )
    output.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="load and attainment over time (of a sweep: over the rate), PNG",
    )  # fmt: skip
    output.add_argument("--json", action="store_true", help="print one JSON object")


def _add_cluster_arguments(cluster: argparse._ArgumentGroup) -> None:
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


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated, beside what arrives."""

    candidate: Candidate
    config: ClusterConfig
    workload: Workload
    objective: Objective
    kv_bytes_per_token: int


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """1 when the targets are missed."""
    _check(args)
    setup = _setup(args)
    if args.sweep is not None:
        from baton.cli.simulate_sweep import run_sweep

        return run_sweep(args, setup, _swept)
    arrivals = _with_targets(arrivals_of(setup.workload, args, DEFAULT_REQUESTS), setup.objective)
    if args.autoscale:
        with _progress("simulating", len(arrivals)) as update:
            return run_autoscaled(args, setup, arrivals, update)
    return _run_fixed(args, setup, arrivals)


def _run_fixed(args: argparse.Namespace, setup: Setup, arrivals: list[Arrival]) -> int:
    from baton.cli.simulate_report import RunText, print_run, run_json
    from services.planner.plot import draw_run

    started_s = time.perf_counter()
    with _progress("simulating", len(arrivals)) as update:
        report = _report_of(setup, arrivals, update)
    took_s = time.perf_counter() - started_s
    name = setup.candidate.name
    if args.json:
        print(json.dumps({**run_json(report, name, args.price), "took_s": took_s}, indent=1))
    else:
        print_run(report, RunText(name, setup.objective, args.price, took_s))
    if args.plot is not None:
        draw_run(args.plot, report)
    return 0 if report.attainment >= args.share else 1


def _report_of(
    setup: Setup, arrivals: list[Arrival], update: Callable[[int], None] | None
) -> RunReport:
    from baton.simulator.cluster import SimCluster
    from baton.simulator.run_report import run_report
    from services.router.admission.slo import SloTargets

    cluster = SimCluster(setup.config)
    outcomes = cluster.run(arrivals, progress=update)
    return run_report(
        outcomes,
        {str(name): worker.busy_s for name, worker in cluster.workers.items()},
        SloTargets(setup.objective.ttft_s, setup.objective.itl_s),
        num_devices=setup.candidate.num_devices,
        kv_bytes_per_token=setup.kv_bytes_per_token,
    )


def _swept(args: argparse.Namespace, setup: Setup, rates: list[float]) -> list[RunReport]:
    """One run at each rate."""
    num = args.requests or DEFAULT_REQUESTS
    reports = []
    with _progress("simulating", num * len(rates)) as update:
        for i, rate in enumerate(rates):
            arrivals = _with_targets(setup.workload.arrivals(rate, num, args.seed), setup.objective)
            done = i * num
            reports.append(_report_of(setup, arrivals, lambda n, done=done: update(done + n)))  # type: ignore[misc]
    return reports


def _check(args: argparse.Namespace) -> None:
    names = ["block_size", "decode", "prefill_tp", "decode_tp", "routers", "step_tokens"]
    names += [name for name in ("requests", "limit") if getattr(args, name) is not None]
    check_counts(args, *names)
    if args.prefill < 0:
        raise ConfigError(f"--prefill must not be negative, got {args.prefill}")
    for option, value in (("--price", args.price), ("--seconds", args.seconds)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{option} must be above 0 and finite, got {value:g}")
    if args.sweep is not None and (args.autoscale or args.rate is not None):
        raise ConfigError(
            "--sweep tries rates on pools that stay: leave --rate and --autoscale out"
        )
    if args.rate is not None:
        rates_of(args.rate)


def _setup(args: argparse.Namespace) -> Setup:
    from services.planner.candidate import Candidate, Pool, cluster_of
    from services.planner.objective import Objective
    from services.router.admission.admission_config import AdmissionConfig
    from services.router.placement.policy_config import PolicyConfig, PolicyName

    objective = Objective(args.ttft, args.itl, args.share)
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
    room = min(pool.model.max_kv_tokens for pool in (candidate.prefill, candidate.decode) if pool)
    if workload.max_tokens >= room:
        raise ConfigError(
            f"the longest request has {workload.max_tokens} tokens, a worker has room for the KV "
            f"of {room}: give it more GPUs (--prefill-tp, --decode-tp)"
        )
    return Setup(candidate, config, workload, objective, kv_bytes)


def _with_targets(arrivals: list[Arrival], objective: Objective) -> list[Arrival]:
    from services.router.admission.slo import SloTargets

    targets = SloTargets(objective.ttft_s, objective.itl_s)
    return [dataclasses.replace(arrival, targets=targets) for arrival in arrivals]


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console

    from baton.cli.progress import TerminalProgress
    from baton.model_import.progress import Unit

    with TerminalProgress(Console(stderr=True)) as progress:
        progress.start_stage(what, total, Unit.REQUESTS)

        def update(num_done: int) -> None:
            if num_done % PROGRESS_STEP == 0:
                progress.update(num_done)

        yield update
