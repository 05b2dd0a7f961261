"""Every kernel beside its peers and the card's limits, measured in one run.

    python -m bench.kernels [--groups decode-attention,...] [--budget-s 420] [--out DIR] [--jobs N]
    python -m bench.kernels --dry-run     checks every case at tiny sizes without a GPU
    python -m bench.kernels --list

Copy and read bandwidth and the matmul peaks are measured first. Each case is checked against a
float32 reference on the inputs it is timed on; a wrong one is reported and not timed. What did
not fit into the budget is listed. FlashAttention-3 takes part if `vllm_flash_attn` can be imported.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine
from bench.gpu.interpreted import interpreted

if TYPE_CHECKING:
    from bench.gpu.cases import CasePlanner, PlannedCase, Scale
    from bench.gpu.report import CaseResult

GROUPS = (
    "decode-attention",
    "prefill-attention",
    "skinny-gemm",
    "weight-only-gemm",
    "fp8-gemm",
    "sampling",
    "norms",
    "rope",
    "block-copy",
)
"""The most telling first: what runs out of time is at the end."""
BUDGET_S = 420.0
WARM_SHARE = 0.35
"""Of the budget, at most, for compiling ahead."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list or options.dry_run:
        with interpreted():
            return _list(options) if options.list else _dry_run(options)
    return _measure(options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--groups", type=_groups, default=GROUPS, help="comma-separated")
    parser.add_argument("--only", default="", help="cases whose names contain this text")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all cases")
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the JSON")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead")
    parser.add_argument("--commit", help="names the tree where there is no git to ask")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no GPU, no times")
    parser.add_argument("--list", action="store_true", help="print the cases")
    return parser.parse_args(arguments)


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: give some of {', '.join(GROUPS)}")
    return names


def planners() -> dict[str, CasePlanner]:
    """Imported late: whether Triton interprets is settled when it is imported."""
    from bench.gpu import attention_cases, gemm_cases, sampling_cases, small_cases

    return {
        "decode-attention": attention_cases.decode_cases,
        "prefill-attention": attention_cases.prefill_cases,
        "skinny-gemm": gemm_cases.skinny_cases,
        "weight-only-gemm": gemm_cases.weight_only_cases,
        "fp8-gemm": gemm_cases.fp8_cases,
        "sampling": sampling_cases.sampling_cases,
        "norms": small_cases.norm_cases,
        "rope": small_cases.rope_cases,
        "block-copy": small_cases.block_copy_cases,
    }


def plan(scale: Scale, groups: Sequence[str], only: str = "") -> list[PlannedCase]:
    known = planners()
    return [case for group in groups for case in known[group](scale) if only in case.name]


def _list(options: argparse.Namespace) -> int:
    from bench.gpu.cases import TINY_SCALE

    planned = plan(TINY_SCALE, options.groups, options.only)
    for case in planned:
        print(f"{case.group}: {case.name}")
    print(f"{len(planned)} cases")
    return 0


def _dry_run(options: argparse.Namespace) -> int:
    """Builds and checks every case under the interpreter; exit status 1 if one is wrong."""
    import torch

    from bench.gpu.case_runner import Budget, CaseRunner
    from bench.gpu.cases import TINY_SCALE
    from bench.gpu.ceilings import Ceilings
    from bench.gpu.report import Status

    torch.manual_seed(0)
    runner = CaseRunner(Ceilings(1, 1, 1), None, _print, lambda: True)
    planned = plan(TINY_SCALE, options.groups, options.only)
    run = runner.run(planned, Budget(math.inf))
    bad = [r for r in run.results if r.status is not Status.CHECKED]
    print(f"{len(run.results)} of {len(planned)} cases checked, {len(bad)} of them bad")
    for line in run.not_run:
        print(f"not run: {line}")
    return 1 if bad else 0


def _measure(options: argparse.Namespace) -> int:
    import torch

    from bench.gpu.case_runner import Budget, CaseRunner
    from bench.gpu.cases import GPU_SCALE
    from bench.gpu.ceilings import measure_ceilings
    from bench.gpu.goals import evaluate
    from bench.gpu.report import ceilings_line, results_json
    from bench.gpu.timing import time_in_turns

    if not torch.cuda.is_available():
        print("no CUDA device: only --dry-run and --list work here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    about = machine.describe() | machine.describe_gpu()
    about["commit"] = options.commit or about["commit"]
    budget = Budget(options.budget_s)
    ceilings = measure_ceilings()
    print(f"{about['gpu']}, driver {about['driver']}: {ceilings_line(ceilings)}", flush=True)
    planned = plan(GPU_SCALE, options.groups, options.only)
    if options.jobs:
        _warm_up(options, len(planned), budget.left_s * WARM_SHARE)
    results: list[CaseResult] = []

    def store(not_run: Sequence[str] = ()) -> Path:
        goals = [goal.as_json() for goal in evaluate(results, ceilings)]
        content: dict[str, Any] = results_json(about, ceilings, results, not_run=not_run)
        return machine.store("kernels", content | {"goals": goals}, options.out)

    def keep(result: CaseResult) -> None:
        if not results or results[-1].group != result.group:
            print(f"\n{result.group}")
        results.append(result)
        _print(result)
        # A run that is stopped leaves what it has.
        store()

    run = CaseRunner(ceilings, time_in_turns, keep, _is_device_alive).run(planned, budget)
    print()
    for line in run.not_run:
        print(f"not run: {line}")
    path = store(run.not_run)
    print(f"\n{path}\n\nmust reach ({ceilings_line(ceilings)}):")
    for goal in evaluate(results, ceilings):
        print(goal.row())
    return 0


def _print(result: CaseResult) -> None:
    print(result.row(), flush=True)


def _is_device_alive() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def _warm_up(options: argparse.Namespace, num_cases: int, limit_s: float) -> None:
    """Every case once, each in one of several processes, so that the run finds kernels compiled."""
    from bench.gpu.warm import warm_up

    tasks = [(options.groups, options.only, index) for index in range(num_cases)]
    warmed = warm_up(warm_case, tasks, num_jobs=options.jobs, limit_s=limit_s)
    print(f"compiled ahead for {len(warmed.ready)} of {num_cases} cases", flush=True)
    for index, error in warmed.failed.items():
        print(f"case {index} did not run ahead: {error}")


def warm_case(task: tuple[Sequence[str], str, int]) -> None:
    """Builds one planned case without peers and calls ours once."""
    import torch

    from bench.gpu.cases import OURS, OURS_PDL, Scale

    groups, only, index = task
    scale = Scale(torch.device("cuda"), max_input_sets=1, has_peers=False)
    case = plan(scale, groups, only)[index].build()
    for name in (OURS, OURS_PDL):
        for call in case.contenders.get(name, ()):
            call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
