"""`baton profile`: measure the engine's steps here, for plans, simulations and the autoscaler."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.core.errors import ConfigError, Unavailable
from baton.process import add_settings_arguments

if TYPE_CHECKING:
    from baton.cli.profile_pools import PoolMeasured
    from baton.cli.progress import TerminalProgress
    from services.launch.config import SystemConfig
    from services.planner.profiling.overheads import LiveSeen

EPILOG = """examples:
  baton profile --out measured.json
      the packaged model on this machine's cores; settings as `baton serve` has them
  baton profile --model ./llama-3.1-8b --out h200.json \\
    --set prefill.engine.device=cuda --set decode.engine.device=cuda
  baton profile --model ./llama-3.1-70b --prefill-tp 4 --decode-tp 4 --config gpu.yaml --out 70.json
then
  baton plan --profile measured.json --gpus 8 --lengths 2048/256 --ttft 0.5 --itl 0.02
  baton simulate --profile measured.json --lengths 512/64 --rate 2 --ttft 2 --itl 0.1

What is measured: prompts of several lengths behind cached prefixes, decode steps over batch sizes
and contexts, and both in one step, each several times on fresh random tokens; then a live system
with one worker a pool: start-up, what a request costs beside steps, the hand-off, and how much
workers on the same cores slow each other down. Measure on a quiet machine: the errors at the end
say how well the figures describe it. Two workers on one GPU need a gpu_memory_fraction of less than
half each; --no-system measures the engines alone. docs/profiling.md explains the rest."""
DEFAULT_SECONDS = 90.0
MIN_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="write the profile here, as JSON"
    )
    parser.add_argument(
        "--model", type=Path, metavar="PATH",
        help="Hugging Face folder (default: SmolLM2-135M-Instruct, imported on first use)",
    )  # fmt: skip
    for pool in ("prefill", "decode"):
        parser.add_argument(
            f"--{pool}-tp", type=int, metavar="N", help=f"GPUs of a {pool} worker (default: 1)"
        )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16")
    add_settings_arguments(parser, example="decode.engine.max_num_seqs=16")
    effort = parser.add_argument_group("how carefully")
    effort.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, metavar="S",
        help="for the steps of each pool's engine; more rounds, longer prompts (%(default)g)",
    )  # fmt: skip
    effort.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of the live system (%(default)s)"
    )
    effort.add_argument(
        "--no-system", action="store_true",
        help="measure engines alone; start-up, requests and links are then guesses",
    )  # fmt: skip
    effort.add_argument("--seed", type=int, default=0, metavar="N", help="of all inputs")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """1 when engines were measured, but the live system could not be."""
    from rich.console import Console

    from baton.cli.profile_pools import measure_pools
    from baton.cli.profile_report import print_profile, profile_of
    from baton.cli.progress import TerminalProgress
    from baton.core.logging import setup_logging

    check_arguments(args)
    setup_logging("profile", level="WARNING", as_json=False)
    system = system_config(args, environ)
    seen, failure = None, ""
    with TerminalProgress(Console(stderr=True)) as progress:
        pools = measure_pools(system, args.seconds, seed=args.seed, progress=progress)
        if not args.no_system:
            try:
                seen = _live(system, pools, args, progress)
            except Unavailable as error:
                failure = str(error)
    profile = profile_of(system, pools, seen)
    args.out.write_text(json.dumps(profile, indent=1) + "\n")
    print_profile(profile)
    print(f"wrote {args.out}")
    if failure:
        print(
            f"the live system could not be measured, so start-up, requests, links and neighbours "
            f"are guesses: {failure}",
            file=sys.stderr,
        )
    return 1 if failure else 0


def check_arguments(args: argparse.Namespace) -> None:
    """Before minutes are spent. Raises ConfigError."""
    if not args.seconds >= MIN_SECONDS:
        raise ConfigError(f"--seconds must be at least {MIN_SECONDS:g}, got {args.seconds:g}")
    if args.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {args.rounds}")
    for option, size in (("--prefill-tp", args.prefill_tp), ("--decode-tp", args.decode_tp)):
        if size is not None and size < 1:
            raise ConfigError(f"{option} must be at least 1, got {size}")
    folder = args.out.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"--out {args.out}: folder {folder} does not exist")
    target = args.out if args.out.exists() else folder
    if args.out.is_dir() or not os.access(target, os.W_OK):
        raise ConfigError(f"--out {args.out} cannot be written; name a file in a folder of yours")


def system_config(args: argparse.Namespace, environ: Mapping[str, str]) -> SystemConfig:
    """As `baton serve` would read it, with one worker a pool. Raises ConfigError."""
    from baton.cli.model import import_default
    from baton.core.config import build, merge
    from baton.settings import merge_layers, parse_override
    from services.launch.config import SystemConfig
    from services.launch.pools import check_pools, reads_weights
    from services.launch.readiness import check_model_folder

    flags: dict[str, Any] = {
        "model_path": args.model,
        "prefill": {"engine": {"dtype": args.dtype, "tp_size": args.prefill_tp}},
        "decode": {"engine": {"dtype": args.dtype, "tp_size": args.decode_tp}},
    }
    overrides = merge(flags, *(parse_override(text) for text in args.overrides))
    values = merge_layers(SystemConfig, file=args.config, environ=environ, overrides=overrides)
    if "model_path" not in values:
        values["model_path"] = import_default(environ, dtype=args.dtype or "bfloat16")
    values |= {"num_prefill": 1, "num_decode": 1, "num_routers": 1}
    values.pop("redis_url", None)
    values.pop("autoscale", None)
    system = build(SystemConfig, values)
    check_model_folder(system.model_path, has_weights=reads_weights(system))
    check_pools(system, environ, use_ray=False)
    return system


def _live(
    system: SystemConfig,
    pools: Mapping[str, PoolMeasured],
    args: argparse.Namespace,
    progress: TerminalProgress,
) -> LiveSeen:
    from baton.cli.profile_system import Question, measure_system
    from baton.model_import.progress import Unit

    prefill = pools["prefill"].limits
    longest = min(prefill.max_num_batched_tokens, prefill.max_model_len // 2)
    lengths = sorted({max(16, longest // 8), max(16, longest // 2), longest})
    question = Question(
        prompt_lengths=tuple(lengths),
        stream_prompt_tokens=lengths[0],
        vocab_size=pools["prefill"].vocab_size,
        num_rounds=args.rounds,
        ready_timeout_s=2400.0 if pools["prefill"].is_on_gpu else 300.0,
        seed=args.seed,
    )
    progress.start_stage("live system", args.rounds + 1, Unit.RUNS)
    return measure_system(system, question, on_round=progress.update)
