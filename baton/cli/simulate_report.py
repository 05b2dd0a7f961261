"""How `baton simulate` looks: a table for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from baton.simulator.run_report import RunReport
from services.planner.objective import Objective

MAX_WORKER_ROWS = 40


@dataclass(frozen=True, slots=True)
class RunText:
    """What is said of a run beside its figures."""

    name: str
    objective: Objective
    price: float | None
    took_s: float


def run_json(report: RunReport, name: str, price: float | None) -> dict[str, Any]:
    cost = None if price is None else price * report.device_hours
    return {"cluster": name, **dataclasses.asdict(report), "cost": cost}


def print_run(report: RunReport, text: RunText) -> None:
    console = Console(highlight=False, soft_wrap=True)
    print_figures(console, report, text.name, text.objective, text.price)
    console.print(_workers(report))
    per_minute = 60 * report.summary.num_requests / max(text.took_s, 1e-9)
    console.print(
        f"simulated {report.summary.span_s:.0f} s in {text.took_s:.1f} s: "
        f"{per_minute:,.0f} requests/min"
    )


def print_figures(
    console: Console, report: RunReport, name: str, objective: Objective, price: float | None
) -> None:
    console.print(f"[bold]{name}[/bold]")
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for label, text in _rows(report, objective, price):
        table.add_row(label, text)
    console.print(table)


def _rows(report: RunReport, objective: Objective, price: float | None) -> list[tuple[str, str]]:
    s = report.summary
    cost = f"{report.device_hours:.3f} GPU hours"
    if price is not None:
        per_thousand = 1000 * price * report.device_hours / max(1, s.num_requests)
        cost += f", {price * report.device_hours:.2f} in all, {per_thousand:.3f} per 1,000 requests"
    return [
        ("requests", f"{s.num_requests} ended, {report.refused_share:.1%} refused"),
        (
            "targets",
            f"{report.attainment:.1%} kept both TTFT {objective.ttft_s:g} s and ITL "
            f"{1000 * objective.itl_s:g} ms",
        ),
        ("goodput", f"{report.goodput_per_s:.2f} requests/s within the targets"),
        ("output", f"{report.output_tokens_per_s:,.0f} tokens/s"),
        (
            "TTFT",
            f"mean {s.ttft_mean_s:.3f}, p50 {s.ttft_p50_s:.3f}, p90 {s.ttft_p90_s:.3f}, "
            f"p99 {s.ttft_p99_s:.3f} s",
        ),
        (
            "ITL",
            f"mean {1000 * s.itl_mean_s:.1f}, p50 {1000 * s.itl_p50_s:.1f}, "
            f"p90 {1000 * s.itl_p90_s:.1f}, p99 {1000 * s.itl_p99_s:.1f} ms",
        ),
        (
            "prefix hits",
            f"{s.hit_rate:.1%} of prompt tokens, {s.fetched_rate:.1%} from other workers",
        ),
        (
            "KV moved",
            f"{report.moved_bytes / 1e9:.1f} GB, {report.moved_bytes_per_s / 1e9:.2f} GB/s",
        ),
        ("cost", cost),
    ]


def _workers(report: RunReport) -> Table:
    table = Table("worker", "busy", "prompts", "decoded", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for use in report.workers[:MAX_WORKER_ROWS]:
        table.add_row(
            use.worker_id, f"{use.busy_share:.0%}", str(use.num_prompts), str(use.num_decoded)
        )
    if len(report.workers) > MAX_WORKER_ROWS:
        rest = report.workers[MAX_WORKER_ROWS:]
        busy = sum(use.busy_share for use in rest) / len(rest)
        prompts, decoded = sum(u.num_prompts for u in rest), sum(u.num_decoded for u in rest)
        table.add_row(f"{len(rest)} more", f"{busy:.0%}", str(prompts), str(decoded))
    return table


def print_sweep(
    rates: Sequence[float], reports: Sequence[RunReport], name: str, objective: Objective
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{name}[/bold]: TTFT within {objective.ttft_s:g} s and ITL within "
        f"{1000 * objective.itl_s:g} ms"
    )
    columns = ("req/s", "kept both", "goodput/s", "refused", "TTFT p90 s", "ITL p90 ms", "busy")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for rate, report in zip(rates, reports, strict=True):
        busy = [use.busy_share for use in report.workers]
        table.add_row(
            f"{rate:.2f}",
            f"{report.attainment:.1%}",
            f"{report.goodput_per_s:.2f}",
            f"{report.refused_share:.1%}",
            f"{report.summary.ttft_p90_s:.3f}",
            f"{1000 * report.summary.itl_p90_s:.1f}",
            f"{sum(busy) / max(1, len(busy)):.0%}",
        )
    console.print(table)
