"""Boards as the JSON that Grafana reads: ids, variables, options of each kind of panel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tools.dashboards.model import (
    SELECTORS,
    Board,
    Panel,
    Query,
    Row,
    Variable,
    View,
    places,
)

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCHEMA_VERSION = 41
"""Of dashboards of Grafana 11.6."""


def to_json(board: Board, others: Sequence[Board]) -> str:
    """As Grafana's provisioning and its sidecar read it, with links to `others`."""
    made = {
        "uid": board.uid,
        "title": board.title,
        "description": board.description,
        "tags": ["baton"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "panels": list(_placed(board.rows)),
        "templating": {"list": [_datasource(), *map(_variable, _all_variables(board))]},
        "annotations": {"list": [_alerts()]},
        "links": [_link(other) for other in others if other.uid != board.uid],
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _placed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Titles of rows and the panels below them."""
    made: list[dict[str, Any]] = []
    for item, place in places(rows):
        number = len(made) + 1
        if isinstance(item, Row):
            made.append(_row(item, number, place))
        else:
            made.append(_panel(item, number, place))
    return made


def _row(row: Row, id: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "row", "id": id, "title": row.title, "collapsed": False, "gridPos": place,
        "panels": [],
    }  # fmt: skip


def _panel(panel: Panel, id: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": panel.view.value,
        "id": id,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [_target(panel, query, n) for n, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.view],
    }


def _target(panel: Panel, query: Query, number: int) -> dict[str, Any]:
    is_instant = panel.view in (View.STAT, View.TABLE)
    formats = {View.HEATMAP: "heatmap", View.TABLE: "table"}
    return {
        "refId": chr(ord("A") + number),
        "datasource": DATASOURCE,
        "expr": query.expr.replace("SEL", SELECTORS),
        "legendFormat": query.legend or "__auto",
        "instant": is_instant,
        "range": not is_instant,
        "format": formats.get(panel.view, "time_series"),
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"value": None, "color": "green"}]
    if panel.warn_above is not None:
        steps.append({"value": panel.warn_above, "color": "red"})
    made: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.max is not None:
        made["max"] = panel.max
    if panel.view is View.LINES:
        made["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.is_stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.is_stacked else "none"},
            "thresholdsStyle": {"mode": "off" if panel.warn_above is None else "line"},
        }
    return made


_OPTIONS: dict[View, dict[str, Any]] = {
    View.LINES: {
        "legend": {
            "displayMode": "table", "placement": "bottom", "showLegend": True,
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    View.STAT: {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "textMode": "auto",
        "wideLayout": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
    },
    View.HEATMAP: {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "unit": "s"},
    },
    View.TABLE: {"showHeader": True, "cellHeight": "sm", "frameIndex": 0},
}  # fmt: skip


def _all_variables(board: Board) -> tuple[Variable, ...]:
    return (
        Variable("namespace", "baton_router_copies", "namespace"),
        Variable("job", 'baton_router_copies{namespace=~"$namespace"}', "job"),
        *board.variables,
    )


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
        "hide": 0, "refresh": 1, "multi": False, "includeAll": False, "regex": "",
    }  # fmt: skip


def _variable(variable: Variable) -> dict[str, Any]:
    values = f"label_values({variable.of.replace('SEL', SELECTORS)}, {variable.label})"
    return {
        "name": variable.name,
        "label": variable.name.replace("_", " ").capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": values,
        "regex": "",
        "refresh": 2,
        "sort": 1,
        "hide": 0,
        "multi": variable.has_many,
        "includeAll": True,
        # A deployment outside of Kubernetes has no label `namespace`, which this matches too.
        "allValue": ".*",
        "current": {"selected": True, "text": "All", "value": "$__all"},
    }


def _alerts() -> dict[str, Any]:
    """Marks where alerts fired."""
    expr = f'ALERTS{{alertname=~"Baton.*",alertstate="firing",{SELECTORS}}}'
    return {
        "name": "Alerts", "datasource": DATASOURCE, "enable": True, "iconColor": "red",
        "expr": expr,
    }  # fmt: skip


def _link(other: Board) -> dict[str, Any]:
    return {
        "title": other.title, "type": "link", "url": f"/d/{other.uid}", "icon": "dashboard",
        "keepTime": True, "includeVars": True, "targetBlank": False, "asDropdown": False,
        "tags": [], "tooltip": other.description,
    }  # fmt: skip
