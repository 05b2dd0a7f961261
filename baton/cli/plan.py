"""`baton plan`: which pools serve most within the targets, on so many GPUs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from baton.cli.plan_explain import add_explain_arguments, run_explain
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
    from services.planner.search import Plan, Question

EPILOG = """examples:
  baton plan --model llama-3.1-8b --gpu h200 --gpus 8 --lengths 2048/256 --ttft 0.5 --itl 0.02
  baton plan --model ./my-model --gpu h100 --gpus 4 --trace requests.csv --ttft 1 --itl 0.05 \\
    --values plan.yaml --plot plan.png
  baton plan --profile measured.json --gpus 3 --lengths 512/64 --ttft 0.4 --itl 0.04
  baton plan --explain decisions.jsonl:120

docs/planning.md explains what is simulated and how far to trust it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_machine_arguments(parser)
    parser.add_argument(
        "--gpus", type=int, required=True, metavar="N", help="GPUs to share out at most"
    )
    add_workload_arguments(parser)
    add_objective_arguments(parser)
    effort = parser.add_argument_group("how carefully")
    effort.add_argument(
        "--requests", type=int, default=400, metavar="N",
        help="of each simulation at least; fewer are faster and say less of the tail (%(default)s)",
    )  # fmt: skip
    effort.add_argument(
        "--span", type=float, default=40.0, metavar="S",
        help="virtual seconds of each simulation at least (%(default)s)",
    )  # fmt: skip
    effort.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of arrivals (%(default)s)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--values", type=Path, metavar="FILE", help="write the choice as chart values"
    )
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw goodput curves as PNG")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    add_explain_arguments(parser)


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """1 when nothing keeps the targets."""
    if args.explain is not None:
        return run_explain(args)
    from rich.console import Console

    from baton.cli.plan_report import plan_json, print_plan
    from baton.cli.progress import TerminalProgress
    from baton.model_import.progress import Unit
    from services.planner.search import num_searches, search

    question = _question(args)
    with TerminalProgress(Console(stderr=True)) as progress:
        progress.start_stage("simulating", num_searches(question), Unit.RUNS)
        done = 0

        def on_run(name: str) -> None:
            nonlocal done
            progress.update(done)
            done += 1

        plan = search(question, on_run=on_run)
    if args.json:
        print(json.dumps(plan_json(question, plan), indent=1))
    else:
        print_plan(question, plan)
    _write(args, question, plan)
    return 0 if plan.chosen is not None else 1


def _write(args: argparse.Namespace, question: Question, plan: Plan) -> None:
    """The files that were asked for."""
    import yaml

    from services.planner.plot import draw_goodput
    from services.planner.values import chart_values

    if args.plot is not None:
        draw_goodput(args.plot, plan.ranking, question.objective)
    if args.values is None:
        return
    pairs = [r for r in plan.ranking if r.candidate.prefill is not None and r.goodput.rate_per_s]
    if not pairs:
        raise ConfigError("no pair of pools keeps the targets, so no values were written")
    best = pairs[0].candidate
    copies = max(1, question.max_devices // best.num_devices)
    values = chart_values(best, block_size=question.layout.block_size, num_copies=copies)
    args.values.write_text(yaml.safe_dump(values, sort_keys=False))


def _question(args: argparse.Namespace) -> Question:
    from services.planner.objective import Objective
    from services.planner.search import Question

    check_counts(args, "gpus", "block_size", "requests", "span")
    if args.limit is not None:
        check_counts(args, "limit")
    workload, block_size = workload_of(args)
    prefill, decode, kv_bytes = models_of(args, args.gpus)
    return Question(
        workload,
        Objective(args.ttft, args.itl, args.share),
        prefill,
        decode,
        layout_of(workload, block_size, kv_bytes),
        args.gpus,
        args.seed,
        args.requests,
        args.span,
    )
