"""Goodput curves and simulated runs as PNGs. Needs matplotlib, which the extra `plots` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import ConfigError
from baton.simulator.run_report import RunReport
from services.planner.elastic import Sample
from services.planner.objective import Objective
from services.planner.search import Ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CURVES = 4


def new_figure(height: float = 4.2) -> Figure:
    """Raises ConfigError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plots need matplotlib: pip install 'baton[plots]', or leave --plot out"
        ) from None
    return Figure(figsize=(7, height), layout="constrained")


def draw_goodput(path: Path, ranking: Sequence[Ranked], objective: Objective) -> None:
    """Share of requests that meet both targets against requests per second and device.

    Raises ConfigError when matplotlib is missing.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for ranked in ranking[:MAX_CURVES]:
        points = ranked.goodput.points
        rates = [p.rate_per_s / ranked.candidate.num_devices for p in points]
        shares = [100 * min(p.attainment.ttft, p.attainment.itl) for p in points]
        axes.plot(rates, shares, marker=".", label=ranked.candidate.name)
    axes.axhline(100 * objective.share, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("requests per second and device")
    axes.set_ylabel(
        f"% of requests within TTFT {objective.ttft_s:g} s / ITL {1000 * objective.itl_s:g} ms"
    )
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_run(path: Path, report: RunReport) -> None:
    """Load and attainment over time. Raises ConfigError when matplotlib is missing."""
    figure = new_figure()
    load, kept = figure.subplots(2, 1, sharex=True)
    _draw_load(load, report)
    _draw_kept(kept, report)
    kept.set_xlabel("seconds")
    figure.savefig(path, dpi=100)


def draw_elastic(path: Path, report: RunReport, samples: Sequence[Sample]) -> None:
    """Load, workers and attainment over time. Raises ConfigError when matplotlib is missing."""
    figure = new_figure(6.0)
    load, workers, kept = figure.subplots(3, 1, sharex=True)
    _draw_load(load, report)
    times = [sample.now_s for sample in samples]
    paid = ([s.num_prefill for s in samples], [s.num_decode for s in samples])
    ready = ([s.num_ready_prefill for s in samples], [s.num_ready_decode for s in samples])
    for name, color, all_of_it, those_ready in zip(
        ("prefill", "decode"), ("tab:blue", "tab:orange"), paid, ready, strict=True
    ):
        workers.step(times, all_of_it, where="post", color=color, label=name)
        workers.step(times, those_ready, where="post", color=color, linestyle=":", linewidth=1)
    workers.set_ylabel("workers (dotted: ready)")
    workers.set_ylim(bottom=0)
    workers.yaxis.get_major_locator().set_params(integer=True)
    workers.legend(fontsize="small")
    _draw_kept(kept, report)
    kept.set_xlabel("seconds")
    figure.savefig(path, dpi=100)


def draw_sweep(
    path: Path, rates: Sequence[float], reports: Sequence[RunReport], objective: Objective
) -> None:
    """Attainment and goodput against rate. Raises ConfigError when matplotlib is missing."""
    figure = new_figure()
    kept, goodput = figure.subplots(2, 1, sharex=True)
    kept.plot(rates, [100 * report.attainment for report in reports], marker=".")
    kept.axhline(100 * objective.share, color="grey", linestyle=":", linewidth=1)
    kept.set_ylabel("% within both targets")
    kept.set_ylim(0, 102)
    goodput.plot(rates, [report.goodput_per_s for report in reports], marker=".")
    goodput.plot(rates, rates, color="grey", linestyle=":", linewidth=1)
    goodput.set_ylabel("requests/s within them")
    goodput.set_ylim(bottom=0)
    goodput.set_xlabel("requests/s that arrive")
    figure.savefig(path, dpi=100)


def _draw_load(axes: Axes, report: RunReport) -> None:
    times = [window.start_s for window in report.windows]
    axes.step(times, [window.rate_per_s for window in report.windows], where="post")
    axes.set_ylabel("requests/s")
    axes.set_ylim(bottom=0)


def _draw_kept(axes: Axes, report: RunReport) -> None:
    seen = [(w.start_s, 100 * w.attainment) for w in report.windows if w.attainment is not None]
    axes.plot([at_s for at_s, _ in seen], [share for _, share in seen], marker=".")
    axes.set_ylabel("% within the targets")
    axes.set_ylim(0, 102)
