"""How `baton simulate` looks: a table for people, one JSON object for programs, a plot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from baton.simulator.run_report import RunReport
from services.planner.plot import new_figure
from services.router.admission.slo import SloTargets


def run_json(report: RunReport) -> dict[str, Any]:
    return dataclasses.asdict(report)


def print_run(report: RunReport, name: str, targets: SloTargets, *, took_s: float) -> None:
    console = Console(highlight=False, soft_wrap=True)
    summary = report.summary
    console.print(f"[bold]{name}[/bold]")
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for label, text in _rows(report, targets):
        table.add_row(label, text)
    console.print(table)
    console.print(_workers(report))
    per_minute = 60 * summary.num_requests / max(took_s, 1e-9)
    console.print(
        f"simulated {summary.span_s:.0f} s in {took_s:.1f} s: {per_minute:,.0f} requests/min"
    )


def _rows(report: RunReport, targets: SloTargets) -> list[tuple[str, str]]:
    s = report.summary
    return [
        ("requests", f"{s.num_requests} ended, {report.refused_share:.1%} refused"),
        (
            "targets",
            f"{report.attainment:.1%} kept both TTFT {targets.ttft_s:g} s and ITL "
            f"{1000 * (targets.itl_s or 0):g} ms",
        ),
        ("goodput", f"{report.goodput_per_s:.2f} requests/s within the targets"),
        ("output", f"{report.output_tokens_per_s:,.0f} tokens/s"),
        (
            "TTFT",
            f"mean {s.ttft_mean_s:.3f}, p50 {s.ttft_p50_s:.3f}, p90 {s.ttft_p90_s:.3f}, "
            f"p99 {s.ttft_p99_s:.3f} s",
        ),
        ("ITL", f"mean {1000 * s.itl_mean_s:.1f}, p99 {1000 * s.itl_p99_s:.1f} ms"),
        (
            "prefix hits",
            f"{s.hit_rate:.1%} of prompt tokens, {s.fetched_rate:.1%} from other workers",
        ),
        ("cost", f"{report.device_hours:.3f} GPU hours"),
    ]


def _workers(report: RunReport) -> Table:
    table = Table("worker", "busy", "prompts", "decoded", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for use in report.workers:
        table.add_row(
            use.worker_id, f"{use.busy_share:.0%}", str(use.num_prompts), str(use.num_decoded)
        )
    return table


def draw_run(path: Path, report: RunReport) -> None:
    """Raises ConfigError when matplotlib is missing."""
    figure = new_figure()
    load, kept = figure.subplots(2, 1, sharex=True)
    times = [window.start_s for window in report.windows]
    load.step(times, [window.rate_per_s for window in report.windows], where="post")
    load.set_ylabel("requests/s")
    load.set_ylim(bottom=0)
    seen = [(w.start_s, 100 * w.attainment) for w in report.windows if w.attainment is not None]
    kept.plot([at_s for at_s, _ in seen], [share for _, share in seen], marker=".")
    kept.set_ylabel("% within the targets")
    kept.set_ylim(0, 102)
    kept.set_xlabel("seconds")
    figure.savefig(path, dpi=120)
