"""What `baton plan` and `baton simulate` both ask for: what runs, what comes in, what is wanted."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from baton.simulator.arrivals import RateStep, RequestLengths
    from baton.simulator.workload import Arrival
    from services.planner.candidate import Layout
    from services.planner.pool_model import PoolModel
    from services.planner.workload import Workload

MAX_REQUESTS = 5_000_000
"""Of one run: an hour of one core, and some gigabytes."""


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what runs it")
    group.add_argument("--model", metavar="NAME|DIR", help="a known shape, or a model folder")
    group.add_argument(
        "--gpu", metavar="NAME", help="a machine of `baton model info`, such as h200"
    )
    group.add_argument(
        "--profile", type=Path, metavar="FILE", help="measured figures instead of model and GPU"
    )
    group.add_argument(
        "--block-size", type=int, default=64, metavar="N", help="tokens per KV block (%(default)s)"
    )


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked of it")
    group.add_argument(
        "--lengths", metavar="IN/OUT[,IN/OUT...]", help="prompt and output tokens, equally often"
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="Mooncake, Azure, BurstGPT or lengths alone"
    )
    group.add_argument(
        "--no-shared-prefixes",
        action="store_true",
        help="as if no two prompts of the trace began alike: what prefix hits are worth",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="read that many requests of the trace"
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="of arrivals made up from lengths; 1 is Poisson (%(default)s)",
    )


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is wanted")
    group.add_argument(
        "--ttft", type=float, required=True, metavar="S", help="seconds to the first token"
    )
    group.add_argument(
        "--itl", type=float, required=True, metavar="S", help="seconds between tokens"
    )
    group.add_argument(
        "--share",
        type=float,
        default=0.9,
        metavar="X",
        help="of requests that keep each (%(default)s)",
    )


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises ConfigError for an option below 1."""
    for name in names:
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least 1, got {getattr(args, name)}")


def workload_of(args: argparse.Namespace) -> tuple[Workload, int]:
    """With the block size that goes with it."""
    from baton.simulator.trace_files import read_trace
    from services.planner.workload import Replay, SampledLengths

    if (args.lengths is None) == (args.trace is None):
        raise ConfigError("say what comes in: either --lengths IN/OUT or --trace FILE")
    if args.lengths is not None:
        lengths = tuple(_lengths(text) for text in args.lengths.split(","))
        sampled = SampledLengths(args.lengths, lengths, args.block_size, args.burstiness)
        return sampled, args.block_size
    trace = read_trace(args.trace, block_size=args.block_size, limit=args.limit)
    if trace.lengths:
        sampled = SampledLengths(trace.name, trace.lengths, args.block_size, args.burstiness)
        return sampled, args.block_size
    replay = Replay(trace.name, trace.arrivals)
    if args.no_shared_prefixes:
        replay = replay.without_sharing(trace.block_size)
    return replay, trace.block_size


def rates_of(text: str) -> tuple[RateStep, ...]:
    """Of `20`: one step; of `0:5,600:30`: one from each second on. Raises ConfigError."""
    from baton.simulator.arrivals import RateStep

    steps = []
    for part in text.split(","):
        at_s, colon, rate = part.partition(":")
        try:
            steps.append(
                RateStep(float(at_s), float(rate)) if colon else RateStep(0.0, float(at_s))
            )
        except ValueError:
            raise ConfigError(
                f"--rate takes requests per second such as 20, or 0:5,600:30, got {part!r}"
            ) from None
    if len(steps) > 1 and ":" not in text.split(",")[0]:
        raise ConfigError(f"--rate: each of several rates needs its second, 0:5,600:30, got {text}")
    return tuple(steps)


def arrivals_of(
    workload: Workload, args: argparse.Namespace, default_requests: int
) -> list[Arrival]:
    """What `--rate`, `--requests`, `--seconds` and `--seed` say. Raises ConfigError."""
    from baton.simulator.arrivals import varying
    from services.planner.workload import SampledLengths

    steps = rates_of(args.rate) if args.rate is not None else ()
    is_sampled = isinstance(workload, SampledLengths)
    if len(steps) > 1:
        if not isinstance(workload, SampledLengths):
            raise ConfigError("a trace has its own times: give it one --rate, or none")
        if workload.burstiness != 1.0:
            raise ConfigError("arrivals at a rate that changes are Poisson: leave --burstiness out")
        if args.seconds is None:
            raise ConfigError("say for how long requests arrive at these rates: --seconds S")
        _check_number(sum(args.seconds * step.rate_per_s for step in steps) / len(steps))
        arrivals = varying(
            workload.lengths,
            steps,
            until_s=args.seconds,
            block_size=workload.block_size,
            seed=args.seed,
        )
        return arrivals[: args.requests]
    rate = steps[0].rate_per_s if steps else None
    num = args.requests or default_requests
    if args.seconds is not None and not args.requests:
        num = MAX_REQUESTS
        if is_sampled and rate is not None:
            # More than come by then with any burstiness that is told apart from one clump.
            num = int(2 * args.seconds * rate) + 1000
    _check_number(num)
    arrivals = workload.arrivals(rate, num, args.seed)
    return [a for a in arrivals if args.seconds is None or a.at_s <= args.seconds]


def _check_number(num_requests: float) -> None:
    if num_requests > MAX_REQUESTS:
        raise ConfigError(
            f"{num_requests:.0f} requests are more than one run simulates, at most {MAX_REQUESTS}: "
            "lower --requests, --seconds or --rate"
        )


def models_of(
    args: argparse.Namespace, max_devices: int
) -> tuple[dict[int, PoolModel], dict[int, PoolModel], int]:
    """Sizes for prefill and decode, and bytes of KV a token."""
    from services.planner.profile_file import read_profile

    if args.profile is not None:
        if args.model or args.gpu:
            raise ConfigError(
                "--profile holds figures of model and GPU: leave --model and --gpu out"
            )
        profile = read_profile(args.profile)
        return profile.prefill, profile.decode, profile.kv_bytes_per_token
    if not (args.model and args.gpu):
        raise ConfigError("say what runs it: --model and --gpu, or --profile FILE")
    sizes, kv_bytes = _predicted(args.model, args.gpu, max_devices)
    return sizes, dict(sizes), kv_bytes


def layout_of(workload: Workload, block_size: int, kv_bytes: int) -> Layout:
    from services.planner.candidate import Layout

    return Layout(block_size, kv_bytes, 2 ** math.ceil(math.log2(workload.max_tokens + 1)))


def _lengths(text: str) -> RequestLengths:
    from baton.simulator.arrivals import RequestLengths

    prompt, _, output = text.partition("/")
    try:
        pair = int(prompt), int(output)
    except ValueError:
        raise ConfigError(
            f"--lengths takes prompt/output tokens such as 512/64, got {text!r}"
        ) from None
    return RequestLengths(*pair)


def _predicted(name: str, gpu: str, max_devices: int) -> tuple[dict[int, PoolModel], int]:
    from baton.model_info.folder import read_shape
    from baton.model_info.formulas import kv_bytes_per_token
    from baton.model_info.machines import find_machine
    from baton.model_info.report import cost_model
    from baton.model_info.shapes import find_shape
    from services.planner.pool_model import predict

    folder = Path(name)
    if folder.is_dir():
        shape = read_shape(folder)
        model, dtype = cost_model(shape, shape.dtype), shape.dtype
    else:
        model, dtype = find_shape(name), "bfloat16"
    machine = find_machine(gpu)
    sizes: dict[int, PoolModel] = {}
    refused: ConfigError | None = None
    for size in (1, 2, 4, 8):
        if size > max_devices:
            break
        try:
            sizes[size] = predict(model, machine, size, dtype=dtype)
        except ConfigError as error:
            refused = error
    if refused is not None and not sizes:
        raise refused
    return sizes, kv_bytes_per_token(model)
