"""`baton simulate --autoscale`: pools that follow the load within a budget, in virtual time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from baton.cli.planning_args import check_counts
from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from baton.cli.simulate import Setup
    from baton.core.worker_info import Role
    from baton.simulator.arrivals import Arrival
    from services.planner.autoscale_config import AutoscaleConfig, PoolLimits

POOLS = ("prefill", "decode")


def add_autoscale_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pools that follow the load")
    group.add_argument(
        "--autoscale", action="store_true",
        help="--prefill and --decode are what a run starts with; from then on the autoscaler "
        "decides",
    )  # fmt: skip
    group.add_argument(
        "--max-gpus", type=int, default=16, metavar="N",
        help="that both pools may use together (%(default)s)",
    )  # fmt: skip
    for pool in POOLS:
        group.add_argument(
            f"--min-{pool}", type=int, default=1, metavar="N",
            help=f"{pool} workers that always stay; 0 lets the pool go (%(default)s)",
        )  # fmt: skip
        group.add_argument(
            f"--max-{pool}", type=int, metavar="N",
            help=f"{pool} workers at most (as many as --max-gpus allows)",
        )  # fmt: skip
    group.add_argument(
        "--start-seconds", type=float, metavar="S",
        help="from the decision until a new worker takes requests (that of the profile, or 60)",
    )  # fmt: skip
    group.add_argument(
        "--interval", type=float, default=10.0, metavar="S",
        help="between two decisions (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--window", type=float, default=300.0, metavar="S",
        help="a pool shrinks only to what was enough for so long (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--role-changes", action="store_true",
        help="let workers go over to the other pool, where both have the same size",
    )  # fmt: skip


def run_autoscaled(
    args: argparse.Namespace,
    setup: Setup,
    arrivals: list[Arrival],
    update: Callable[[int], None],
) -> int:
    """1 when the targets are missed."""
    from baton.cli.simulate_elastic_report import elastic_json, print_elastic
    from baton.simulator.run_report import run_report
    from services.planner.autoscale import Autoscaler
    from services.planner.elastic import ElasticRun
    from services.planner.pilots import Following
    from services.planner.plot import draw_elastic
    from services.router.admission.slo import SloTargets

    config = autoscale_config(args, setup)
    prefill, decode = setup.candidate.prefill, setup.candidate.decode
    assert prefill is not None
    start_s = max(prefill.model.start_s, decode.model.start_s)
    if args.start_seconds is not None:
        start_s = args.start_seconds
    models = [dataclasses.replace(pool.model, start_s=start_s) for pool in (prefill, decode)]
    pilot = Following(Autoscaler(config, *models), config)
    elastic = ElasticRun(
        setup.config,
        pilot,
        setup.objective,
        start_s=start_s,
        interval_s=args.interval,
        devices_per_worker=_devices(setup),
    )
    started_s = time.perf_counter()
    outcomes = elastic.run(arrivals, progress=update)
    took_s = time.perf_counter() - started_s
    report = run_report(
        outcomes,
        elastic.busy_s,
        SloTargets(args.ttft, args.itl),
        device_s=elastic.device_s,
        kv_bytes_per_token=setup.kv_bytes_per_token,
    )
    name = f"{setup.candidate.name} at the start, at most {config.max_devices} GPUs"
    if args.json:
        told = elastic_json(report, elastic, pilot.decisions, name, args.price)
        print(json.dumps({**told, "took_s": took_s}, indent=1))
    else:
        print_elastic(report, elastic, pilot.decisions, name, setup.objective, args.price)
    if args.plot is not None:
        draw_elastic(args.plot, report, elastic.samples)
    return 0 if report.attainment >= args.share else 1


def autoscale_config(args: argparse.Namespace, setup: Setup) -> AutoscaleConfig:
    """Raises ConfigError for what cannot be, naming the option."""
    from services.planner.autoscale_config import AutoscaleConfig

    if setup.candidate.prefill is None:
        raise ConfigError("--autoscale is for two pools: start with --prefill 1 or more")
    check_counts(args, "max_gpus")
    for name in ("interval", "start_seconds"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be above 0 seconds, got {value:g}")
    prefill, decode = (_limits(args, pool) for pool in POOLS)
    used = setup.candidate.num_devices
    if used > args.max_gpus:
        raise ConfigError(
            f"--prefill and --decode start with {used} GPUs and --max-gpus is {args.max_gpus}: "
            "raise it or start with fewer"
        )
    return AutoscaleConfig(
        args.ttft,
        args.itl,
        args.share,
        max_devices=args.max_gpus,
        prefill=prefill,
        decode=decode,
        window_s=args.window,
        can_change_roles=args.role_changes,
    )


def _limits(args: argparse.Namespace, pool: str) -> PoolLimits:
    from services.planner.autoscale_config import PoolLimits

    size = getattr(args, f"{pool}_tp")
    least, most = getattr(args, f"min_{pool}"), getattr(args, f"max_{pool}")
    if most is None:
        most = max(1, args.max_gpus // size)
    if not 0 <= least <= most or most < 1:
        raise ConfigError(
            f"--min-{pool} {least} must be from 0 to --max-{pool} {most}, which must be at least 1"
        )
    start = getattr(args, pool)
    if not least <= start <= most:
        raise ConfigError(
            f"--{pool} {start} must be from --min-{pool} {least} to --max-{pool} {most}"
        )
    return PoolLimits(least, most, size)


def _devices(setup: Setup) -> dict[Role, int]:
    from baton.core.worker_info import Role

    prefill, decode = setup.candidate.prefill, setup.candidate.decode
    assert prefill is not None
    return {
        Role.PREFILL: prefill.model.tensor_parallel,
        Role.DECODE: decode.model.tensor_parallel,
    }
