"""Goodput curves as a PNG. Needs matplotlib, which the extra `plots` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import ConfigError
from services.planner.objective import Objective
from services.planner.search import Ranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CURVES = 4


def new_figure() -> Figure:
    """Raises ConfigError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plots need matplotlib: pip install 'baton[plots]', or leave --plot out"
        ) from None
    return Figure(figsize=(7, 4.2), layout="constrained")


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
