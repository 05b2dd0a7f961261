"""How `baton plan` looks: a ranking for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from services.planner.goodput import Point
from services.planner.search import Plan, Question, Ranked


def print_plan(question: Question, plan: Plan) -> None:
    console = Console(highlight=False, soft_wrap=True)
    objective = question.objective
    console.print(
        f"[bold]{question.workload.name}[/bold]: TTFT within {objective.ttft_s:g} s and ITL within "
        f"{1000 * objective.itl_s:g} ms, each for {objective.share:.0%} of requests, on at most "
        f"{question.max_devices} GPUs"
    )
    source = next(iter(question.prefill_models.values())).source
    console.print(f"figures: {source}")
    console.print(_table("One worker alone", plan.pools_alone, is_alone=True))
    console.print(_table("Whole, best first", plan.ranking, is_alone=False))
    console.print(_verdict(plan, question))


def plan_json(question: Question, plan: Plan) -> dict[str, Any]:
    chosen = plan.chosen
    return {
        "workload": question.workload.name,
        "objective": dataclasses.asdict(question.objective),
        "max_devices": question.max_devices,
        "chosen": None if chosen is None else chosen.candidate.name,
        "ranking": [_row(ranked) for ranked in plan.ranking],
        "pools_alone": [_row(ranked) for ranked in plan.pools_alone],
        "shortfalls": [
            {
                "target": missed.target,
                "wanted_s": missed.wanted_s,
                "achievable_s": missed.best_s,
                "by": missed.best.title,
            }
            for missed in (() if chosen is not None else plan.shortfalls(question.objective))
        ],
    }


def _row(ranked: Ranked) -> dict[str, Any]:
    return {
        "name": ranked.title,
        "devices": ranked.candidate.num_devices,
        "requests_per_s": ranked.goodput.rate_per_s,
        "requests_per_s_per_device": ranked.rate_per_device,
        "limit": ranked.goodput.limit,
        "curve": [_point(point) for point in ranked.goodput.points],
    }


def _point(point: Point) -> dict[str, float]:
    return {"requests_per_s": point.rate_per_s, **dataclasses.asdict(point.attainment)}


def _table(title: str, ranking: tuple[Ranked, ...], *, is_alone: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("pool" if is_alone else "pools")
    columns = ("req/s",) if is_alone else ("GPUs", "req/s", "req/s/GPU")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("why not more")
    for ranked in ranking:
        rate = f"{ranked.goodput.rate_per_s:.2f}"
        cells = [rate]
        if not is_alone:
            cells = [str(ranked.candidate.num_devices), rate, f"{ranked.rate_per_device:.2f}"]
        table.add_row(ranked.title, *cells, ranked.reason)
    return table


def _verdict(plan: Plan, question: Question) -> str:
    chosen = plan.chosen
    if chosen is None:
        return "[bold]nothing keeps these targets[/bold]" + _achievable(plan, question)
    copies = max(1, question.max_devices // chosen.candidate.num_devices)
    rate = copies * chosen.goodput.rate_per_s
    return f"[bold]take {copies} x ({chosen.candidate.name})[/bold]: about {rate:.1f} requests/s"


def _achievable(plan: Plan, question: Question) -> str:
    """What can be had instead, and why no more."""
    missed = plan.shortfalls(question.objective)
    if not missed:
        return (
            ": each pool alone keeps them, both together do not; see the last column for what is "
            "missed, and loosen that target or take more GPUs a worker (--gpus)"
        )
    lines = []
    for one in missed:
        option, what = (
            ("--ttft", "one prompt alone takes") if one.target == "TTFT"
            else ("--itl", "one step of a single sequence takes")
        )  # fmt: skip
        lines.append(
            f"\n  {one.target} {1000 * one.wanted_s:g} ms: {what} {1000 * one.best_s:.3g} ms on "
            f"the fastest worker ({one.best.title}) for {question.objective.share:.0%} of "
            f"requests. {option} {_rounded_up(one.best_s):g} is the least that can be kept, more "
            "leaves room for load; or take more GPUs a worker (--gpus), or a faster GPU"
        )
    return "".join(lines)


def _rounded_up(seconds: float) -> float:
    """To two digits, never below."""
    if not math.isfinite(seconds) or seconds <= 0:
        return seconds
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return math.ceil(seconds / unit * (1 - 1e-9)) * unit
