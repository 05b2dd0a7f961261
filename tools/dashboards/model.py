"""Dashboards as values.

A board is rows of panels; places follow from their order. In expressions `SEL` stands for the
selectors of the deployment that is looked at.

Does not know: which series there are, since tests look every name up; how Grafana writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

WIDTH = 24
"""Columns of Grafana's grid."""
PANEL_HEIGHT = 8
STAT_HEIGHT = 4
SELECTORS = 'namespace=~"$namespace",job=~"$job"'


class View(Enum):
    LINES = "timeseries"
    STAT = "stat"
    HEATMAP = "heatmap"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and what its series are called, such as `{{worker}}`."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is one of Grafana's ids: s, Bps, bytes, percentunit, reqps, short, none."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    view: View = View.LINES
    width: int = 8
    max: float | None = None
    is_stacked: bool = False
    warn_above: float | None = None
    """A line, or the colour of a number, from this value on."""

    @property
    def height(self) -> int:
        return STAT_HEIGHT if self.view is View.STAT else PANEL_HEIGHT


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """Filled with the values of `label` of the series `of`."""

    name: str
    of: str
    label: str
    has_many: bool = True


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


def lines(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Panel:
    return Panel(title, description, unit, queries, **more)


def stat(title: str, description: str, unit: str, expr: str, **more: Any) -> Panel:
    """One number, the last one."""
    return Panel(title, description, unit, (Query(expr),), view=View.STAT, width=4, **more)


def quantiles(histogram: str, *, by: str = "model", matchers: str = "") -> tuple[Query, ...]:
    """Median, 95th and 99th percentile of a histogram."""
    inner = f"sum by ({by}, le) (rate({histogram}_bucket{{SEL{matchers}}}[$__rate_interval]))"
    return tuple(
        Query(f"histogram_quantile({q}, {inner})", f"p{round(q * 100)} {{{{{by}}}}}")
        for q in (0.5, 0.95, 0.99)
    )


def per_worker(expr: str, *labels: str) -> str:
    """Of what every router reports alike of a worker, `labels` beside its own."""
    return f"max by ({', '.join(('namespace', 'job', 'role', 'worker', *labels))}) ({expr})"


def mean(histogram: str, *, by: str = "model") -> str:
    """Mean of what a histogram saw; without observations there is none."""
    total, count = (
        f"sum by ({by}) (rate({histogram}_{part}{{SEL}}[$__rate_interval]))"
        for part in ("sum", "count")
    )
    return f"{total} / ({count} > 0)"


def panelplaces(rows: Sequence[Row]) -> list[tuple[Panel, dict[str, int]]]:
    """Where each panel is, in columns and rows of Grafana's grid."""
    return [(item, place) for item, place in places(rows) if isinstance(item, Panel)]


def places(rows: Sequence[Row]) -> Iterator[tuple[Row | Panel, dict[str, int]]]:
    """From left to right below the title of their row, as many as fit."""
    top = 0
    for row in rows:
        yield row, {"x": 0, "y": top, "w": WIDTH, "h": 1}
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left, height = top + height, 0, 0
            yield panel, {"x": left, "y": top, "w": panel.width, "h": panel.height}
            left, height = left + panel.width, max(height, panel.height)
        top += height
