"""Dashboards: read by Grafana's own library, laid out without overlap, asking for what exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from baton.core.metrics import ALL_SERIES
from baton.core.planner_metrics import PLANNER_SERIES
from dashboard_files import (
    BUILT_IN,
    DASHBOARDS,
    PanelQuery,
    panel_queries,
    panels,
    read_dashboard,
)
from promql_names import ADDED_BY_SCRAPE, SUFFIXES, known_series, selectors
from rule_files import read_rules

UNITS = {"s", "Bps", "bytes", "percentunit", "reqps", "ops", "short", "none"}
TARGET_KEYS = {"refId", "datasource", "expr", "legendFormat", "instant", "range", "format"}


@pytest.fixture(params=DASHBOARDS, ids=lambda file: file.stem)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_dashboard(request.param)


def test_there_are_four_with_names_of_their_own() -> None:
    assert [file.stem for file in DASHBOARDS] == ["fabric", "overview", "pools", "router"]
    boards = [read_dashboard(file) for file in DASHBOARDS]
    assert {board["uid"] for board in boards} == {f"baton-{file.stem}" for file in DASHBOARDS}
    for board in boards:
        links = {link["url"] for link in board["links"]}
        assert links == {f"/d/{other['uid']}" for other in boards if other is not board}


def test_grafanas_library_reads_all_of_it(board: dict[str, Any]) -> None:
    register_default_plugins()
    read = Dashboard.from_json(board)
    again = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert list(_lost(board, again, "")) == []
    # The library keeps what a target has and it does not know.
    for panel in panels(board):
        assert all(set(target) == TARGET_KEYS for target in panel["targets"])


def test_an_unknown_field_would_be_seen() -> None:
    register_default_plugins()
    board = read_dashboard(DASHBOARDS[0])
    board["titel"] = "x"
    board["panels"][1]["gridPoss"] = {}
    board["panels"][1]["options"]["legend"]["palcement"] = "bottom"
    again = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))
    lost = list(_lost(board, again, ""))
    assert lost == ["/panels/1/options/legend/palcement", "/panels/1/gridPoss", "/titel"]


def test_panels_have_places_of_their_own(board: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)
    places = [panel["gridPos"] for panel in board["panels"]]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["w"] and place["h"]
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_panels_explain_themselves(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_everything_asks_the_chosen_source(board: dict[str, Any]) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = board["templating"]["list"]
    assert variables[0]["type"] == "datasource" and variables[0]["query"] == "prometheus"
    asking = [*panels(board), *variables[1:], *board["annotations"]["list"]]
    asking += [target for panel in panels(board) for target in panel["targets"]]
    assert all(each["datasource"] == source for each in asking)


def test_every_query_follows_the_chosen_deployment(board: dict[str, Any]) -> None:
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = set[str]()
    for panel in panels(board):
        for target in panel["targets"]:
            variables = set(re.findall(r"\$(\w+)", target["expr"]))
            used |= variables
            assert variables <= names | BUILT_IN, panel["title"]
            for name, labels in selectors(_parsed(target["expr"])):
                assert {"job", "namespace"} <= labels, f"{panel['title']}: {name}"
    asked = "".join(str(variable["query"]) for variable in board["templating"]["list"])
    # A variable that nothing uses would only seem to choose something.
    assert names - {"datasource"} <= used | set(re.findall(r"\$(\w+)", asked))


def test_every_series_and_label_exists(board: dict[str, Any]) -> None:
    recorded = {rule.name for rule in read_rules() if not rule.is_alert}
    known = known_series()
    queries = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    for variable in board["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
        assert match
        queries.append(f"count by ({match[2]}) ({match[1]})")
    for query in queries:
        for name, labels in selectors(_parsed(query)):
            assert name in known or name in recorded, name
            if name in known:
                assert labels <= known[name] | ADDED_BY_SCRAPE, (name, labels)


def _parsed(expr: str) -> str:
    """With durations that a parser takes."""
    return PanelQuery("", "", expr, False).filled_in("x", interval_s=30, range_s=60)


def _lost(before: Any, after: Any, path: str) -> Iterator[str]:
    """What is in `before` and not the same in `after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            if name in after:
                yield from _lost(value, after[name], f"{path}/{name}")
            else:
                yield f"{path}/{name}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _lost(one, other, f"{path}/{index}")
    elif before != after:
        yield f"{path}: {before!r} became {after!r}"


def test_every_series_is_looked_at() -> None:
    """By a panel or a rule: what nobody sees need not be measured."""
    queries = [query.filled_in("x", interval_s=30, range_s=60) for query in panel_queries()]
    queries += [rule.expr for rule in read_rules()]
    seen = {name for query in queries for name, _ in selectors(query)}
    seen |= {name.removesuffix(suffix) for name in seen for suffix in SUFFIXES}
    declared = (*ALL_SERIES, *PLANNER_SERIES)
    unseen = [series.name for series in declared if series.name not in seen]
    assert not unseen, "put them on a panel of tools/dashboards, then `make chart`"
