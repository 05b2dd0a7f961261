"""The four dashboards as the files that the chart ships."""

from __future__ import annotations

from tools.dashboards import fabric, overview, pools, router
from tools.dashboards.grafana_json import to_json

BOARDS = {
    "overview": overview.BOARD,
    "pools": pools.BOARD,
    "fabric": fabric.BOARD,
    "router": router.BOARD,
}


def make_dashboards() -> dict[str, str]:
    """File name -> content."""
    boards = tuple(BOARDS.values())
    return {f"{name}.json": to_json(board, boards) for name, board in BOARDS.items()}
