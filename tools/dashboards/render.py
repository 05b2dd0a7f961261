"""Pictures of the dashboards from a live Prometheus, where there is no Grafana to look at them.

    python -m tools.dashboards.render --prometheus http://127.0.0.1:9090 --job baton --out pictures/

Each board becomes one PNG, its panels where Grafana would put them, without its colours.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tools.dashboards.build import BOARDS
from tools.dashboards.model import (
    SELECTORS,
    WIDTH,
    Board,
    Panel,
    Query,
    View,
    places,
)

COLUMN_INCHES, ROW_INCHES = 0.75, 0.36
MAX_LINES = 12
TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Span:
    """What is looked at: `range_s` up to `end_s`, since the epoch."""

    job: str
    end_s: float
    range_s: int
    interval_s: int

    @property
    def step_s(self) -> float:
        """Between two points of a line."""
        return max(1.0, self.range_s / 300)

    def filled_in(self, query: Query) -> str:
        """The query with this job, and all of everything else."""
        given = {"job": re.escape(self.job), "__range": f"{self.range_s}s"}
        given["__rate_interval"] = f"{self.interval_s}s"
        expr = query.expr.replace("SEL", SELECTORS)
        return re.sub(r"\$(\w+)", lambda match: given.get(match[1], ".*"), expr)


@dataclass(frozen=True, slots=True)
class Line:
    """One series, `values` at `times` (seconds from the end of the span, so not positive)."""

    name: str
    labels: dict[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]


def fetch(client: httpx.Client, panel: Panel, span: Span) -> list[Line]:
    """All series of a panel over the span. Raises RuntimeError with what Prometheus said."""
    found = []
    for query in panel.queries:
        answer = client.get(
            "/api/v1/query_range",
            params={
                "query": span.filled_in(query), "start": span.end_s - span.range_s,
                "end": span.end_s, "step": span.step_s,
            },
        ).json()  # fmt: skip
        if answer["status"] != "success":
            raise RuntimeError(f"{panel.title}: {answer.get('error')}")
        for series in answer["data"]["result"]:
            points = [(at - span.end_s, float(value)) for at, value in series["values"]]
            points = [(at, value) for at, value in points if math.isfinite(value)]
            if points:
                times, values = zip(*points, strict=True)
                labels = series["metric"]
                found.append(Line(_name(query, labels), labels, times, values))
    return found


def _name(query: Query, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), query.legend).strip()


def draw(board: Board, client: httpx.Client, span: Span, file: Path) -> None:
    panels = [(item, place) for item, place in places(board.rows) if isinstance(item, Panel)]
    rows = max(place["y"] + place["h"] for _, place in panels)
    figure = plt.figure(figsize=(WIDTH * COLUMN_INCHES, rows * ROW_INCHES))
    figure.suptitle(f"{board.title}, {span.job}", y=1 - 0.1 / rows, fontsize=13)
    for panel, place in panels:
        # Room for the title above and the labels of the axes.
        left, bottom = place["x"] + 0.7, rows - place["y"] - place["h"] + 1.0
        size = (place["w"] - 1.1, place["h"] - 2.0)
        axes = figure.add_axes(
            (left / WIDTH, bottom / rows, size[0] / WIDTH, size[1] / rows), title=panel.title
        )
        axes.title.set_fontsize(9)
        _draw_panel(axes, panel, fetch(client, panel, span), span)
    figure.savefig(file, dpi=72)
    plt.close(figure)


def _draw_panel(axes: Axes, panel: Panel, lines: list[Line], span: Span) -> None:
    if panel.view is View.STAT:
        text = "no data" if not lines else _number(lines[0].values[-1], panel.unit)
        axes.set_axis_off()
        axes.text(0.5, 0.3, text, ha="center", va="center", fontsize=16)
        return
    if panel.view is View.TABLE:
        axes.set_axis_off()
        text = "\n".join("  ".join(line.labels.values()) for line in lines)
        axes.text(0, 1, text, va="top", fontsize=6)
        return
    axes.tick_params(labelsize=6)
    if panel.view is View.HEATMAP:
        _draw_heat(axes, lines)
        return
    for line in sorted(lines, key=lambda line: -max(line.values))[:MAX_LINES]:
        times, values = _with_gaps(line, 1.5 * span.step_s)
        axes.plot(times, values, lw=1, label=line.name or None)
    if any(line.name for line in lines):
        axes.legend(fontsize=6, loc="upper left", framealpha=0.5)
    axes.set_xlim(-span.range_s, 0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: _number(value, panel.unit))


def _with_gaps(line: Line, longest_s: float) -> tuple[list[float], list[float]]:
    """Where there were no samples there is no line."""
    times, values = [line.times[0]], [line.values[0]]
    for at, value in zip(line.times[1:], line.values[1:], strict=True):
        if at - times[-1] > longest_s:
            times.append(at)
            values.append(math.nan)
        times.append(at)
        values.append(value)
    return times, values


def _draw_heat(axes: Axes, lines: list[Line]) -> None:
    """Buckets from below to above, darker where more values fell."""
    buckets = sorted(lines, key=lambda line: float(line.labels["le"]))
    times = sorted({at for line in buckets for at in line.times})
    below = [0.0] * len(times)
    counts = []
    for line in buckets:
        at = dict(zip(line.times, line.values, strict=True))
        up_to = [at.get(time, 0.0) for time in times]
        counts.append([max(0.0, more - less) for more, less in zip(up_to, below, strict=True)])
        below = up_to
    if counts:
        axes.pcolormesh(times, range(len(counts)), counts, cmap="Blues", shading="nearest")
        axes.set_yticks(range(len(buckets)), [line.labels["le"] for line in buckets], fontsize=5)


def _number(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {prefix}{_SHORT.get(unit, '')}"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} {_SHORT.get(unit, '')}".strip()


_SHORT = {"s": "s", "Bps": "B/s", "bytes": "B", "reqps": "/s", "ops": "/s"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its URL")
    parser.add_argument("--job", default="baton", help="the deployment")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    parser.add_argument("--board", choices=BOARDS, action="append", help="only this one")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--interval", type=int, default=60, help="seconds that a rate is over")
    args = parser.parse_args(argv)
    span = Span(args.job, time.time(), int(args.minutes * 60), args.interval)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with httpx.Client(base_url=args.prometheus, timeout=TIMEOUT_S, trust_env=False) as client:
            for name in args.board or BOARDS:
                draw(BOARDS[name], client, span, args.out / f"{name}.png")
                print(args.out / f"{name}.png")
    except (httpx.HTTPError, RuntimeError) as error:
        print(f"{args.prometheus}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
