"""The chart's dashboards as data, and their queries as Grafana would send them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chart import CHART

DASHBOARDS = sorted((CHART / "files/dashboards").glob("*.json"))
BUILT_IN = {"__rate_interval", "__interval", "__range"}


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of one panel."""

    board: str
    panel: str
    expr: str
    is_instant: bool

    def filled_in(self, job: str, *, interval_s: int, range_s: int) -> str:
        """With `job` chosen, and all of every other variable."""
        values = {"__rate_interval": f"{interval_s}s", "__interval": f"{interval_s}s"}
        values |= {"__range": f"{range_s}s", "job": job}
        return re.sub(r"\$(\w+)", lambda match: values.get(match[1], ".*"), self.expr)


def read_dashboard(file: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(file.read_text())
    return board


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something: no titles of rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[PanelQuery]:
    for file in DASHBOARDS:
        for panel in panels(read_dashboard(file)):
            for target in panel["targets"]:
                yield PanelQuery(file.stem, panel["title"], target["expr"], target["instant"])
