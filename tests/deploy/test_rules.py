"""Rules of Prometheus: checked by its own tool, every alert tried, every name known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.core.metrics import ALL_SERIES
from baton.core.planner_metrics import PLANNER_SERIES
from chart import CHART, ROOT, SECRET, TESTS, values_file
from monitoring_tools import MonitoringTools, monitoring_tools
from promql_names import ADDED_BY_SCRAPE, known_series, selectors
from rule_files import RULES, read_rules
from services.router.config import RouterConfig
from services.worker.config import WorkerConfig
from tools.helm import Helm
from tools.settings_schema import setting_paths

RUNBOOK = ROOT / "docs/runbook.md"
UNIT_TESTS = sorted((TESTS / "rules").glob("*.yaml"))
EVERY_RULE = read_rules()
ALERTS = [rule for rule in EVERY_RULE if rule.is_alert]


@pytest.fixture(scope="module")
def tools() -> MonitoringTools:
    return monitoring_tools()


def test_prometheus_takes_every_file(tools: MonitoringTools) -> None:
    done = tools.run(tools.promtool, "check", "rules", "--lint-fatal", *sorted(RULES.glob("*")))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_rules_do_what_their_unit_tests_say(tools: MonitoringTools, file: Path) -> None:
    done = tools.run(tools.promtool, "test", "rules", file)
    assert done.returncode == 0, done.stdout


def test_every_alert_is_seen_to_fire_and_not_to_fire() -> None:
    fires, stays_quiet = set[str](), set[str]()
    for file in UNIT_TESTS:
        for group in yaml.safe_load(file.read_text())["tests"]:
            for case in group.get("alert_rule_test", ()):
                (fires if case["exp_alerts"] else stays_quiet).add(case["alertname"])
    names = {rule.name for rule in ALERTS}
    assert names and fires == names and stays_quiet == names


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    entries = re.split(r"^### ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:]
    parts = {entry.split("\n", 1)[0].strip(): entry for entry in entries}
    assert set(parts) == {rule.name for rule in ALERTS}
    for rule in ALERTS:
        assert rule.body["annotations"]["runbook_url"] == f"docs/runbook.md#{rule.name.lower()}"
        for heading in ("**Means**", "**Confirm**", "**Do**"):
            assert heading in parts[rule.name], f"{rule.name} has no {heading}"


def test_every_alert_says_who_what_and_how_much() -> None:
    for rule in ALERTS:
        body = rule.body
        assert rule.name.startswith("Baton")
        assert set(body["annotations"]) == {"summary", "description", "runbook_url"}
        assert body["labels"]["severity"] in ("critical", "warning", "info")
        description = body["annotations"]["description"]
        has_number = "$value" in description or re.search(r"\d", description)
        assert has_number, rule.name
        # A summary is a line in a chat; it has no room for values.
        assert "$value" not in body["annotations"]["summary"]


def test_rules_ask_for_series_and_labels_that_exist() -> None:
    recorded = {rule.name for rule in EVERY_RULE if not rule.is_alert}
    known = known_series()
    for rule in EVERY_RULE:
        for name, labels in selectors(rule.expr):
            assert name in known or name in recorded, f"{rule.name} asks for {name}"
            if name in known:
                unknown = labels - known[name] - ADDED_BY_SCRAPE
                assert not unknown, f"{rule.name}: {name} has no label {unknown}"


def test_names_of_queries_in_the_runbook_exist() -> None:
    recorded = {rule.name for rule in EVERY_RULE if not rule.is_alert}
    for name in set(re.findall(r"\bbaton:[a-z0-9_:]+", RUNBOOK.read_text())):
        assert name in recorded, name
    declared = {series.name for series in (*ALL_SERIES, *PLANNER_SERIES)}
    found = set(re.findall(r"\bbaton_[a-z0-9_]+", RUNBOOK.read_text()))
    for name in found:
        assert re.sub("_(bucket|sum|count)$", "", name) in declared, name


def test_settings_that_the_runbook_names_exist() -> None:
    known = setting_paths(RouterConfig) | setting_paths(WorkerConfig)
    sections = {path.partition(".")[0] for path in known if "." in path}
    for name in re.findall(r"`([a-z_]+\.[a-z_.*]+)`", RUNBOOK.read_text()):
        if name.partition(".")[0] in sections:
            prefix = name.removesuffix("*")
            assert any(p == name or (name != prefix and p.startswith(prefix)) for p in known), name
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for name in ("router.replicas", "networkPolicy.scrapers"):
        section, _, key = name.partition(".")
        assert key in values[section] and f"`{name}`" in RUNBOOK.read_text()


def limits() -> dict[str, Any]:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    return values["monitoring"]["prometheusRule"]["limits"]


def test_limits_in_the_files_are_those_of_the_values() -> None:
    text = "".join(file.read_text() for file in sorted(RULES.glob("*.yaml")))
    in_queries = re.findall(r"([0-9.]+) # limit (\w+)", text)
    in_texts = re.findall(r"\{\{/\* limit (\w+) \*/\}\}([0-9]+(?:\.[0-9]+)?)", text)
    found = {(key, float(value)) for value, key in in_queries}
    found |= {(key, float(value)) for key, value in in_texts}
    assert found == {(key, float(value)) for key, value in limits().items()}
    assert {key for _, key in in_queries} == set(limits())
    # A limit that an alert compares with is also named in what it says.
    assert {key for key, _ in in_texts} == set(limits()) - {"sloMinRequests"}


def rendered_rules(helm: Helm, prometheus_rule: dict[str, Any]) -> dict[str, dict[str, Any]]:
    values = {**SECRET, "monitoring": {"prometheusRule": {"enabled": True, **prometheus_rule}}}
    objects = helm.template(CHART, values_file("values-cpu.yaml"), values=values)
    return {
        obj["metadata"]["name"].removeprefix("rel-baton-"): obj["spec"]
        for obj in objects
        if obj["kind"] == "PrometheusRule"
    }


def test_the_chart_ships_the_files_as_they_are(helm: Helm) -> None:
    rendered = rendered_rules(helm, {})
    assert rendered == {file.stem: yaml.safe_load(file.read_text()) for file in RULES.glob("*")}


def test_every_limit_of_the_values_reaches_queries_and_texts(
    helm: Helm, tools: MonitoringTools, tmp_path: Path
) -> None:
    changed = {key: _changed(value) for key, value in limits().items()}
    rendered = rendered_rules(
        helm, {"limits": changed, "runbookUrl": "https://wiki.example.com/baton"}
    )
    for name, spec in rendered.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    text = json.dumps(list(rendered.values()))
    for key, value in changed.items():
        for number in re.findall(rf"([^\s\"]+) # limit {key}\b", text):
            assert float(number) == value
        for number in re.findall(rf"limit {key} \*/\}}\}}([0-9.]*[0-9])", text):
            assert float(number) == value
    done = tools.run(tools.promtool, "check", "rules", *tmp_path.glob("*.yaml"))
    assert done.returncode == 0, done.stdout
    assert "docs/runbook.md" not in text
    for rule in _alerts(rendered):
        url = rule["annotations"]["runbook_url"]
        assert url == f"https://wiki.example.com/baton#{rule['alert'].lower()}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sloTarget", 1),
        ("kvUsageRatio", 90),
        ("decodeWorkers", -1),
        ("failedRatio", "5%"),
        ("queueOldest", 5),
    ],
)
def test_impossible_limits_are_refused_by_name(helm: Helm, key: str, value: Any) -> None:
    with pytest.raises(Exception, match=key):
        rendered_rules(helm, {"limits": {key: value}})


def _changed(value: float) -> float:
    """Another value that the schema allows."""
    return value + 1 if value >= 1 or value == 0 else round(value / 2 + 0.3, 4)


def _alerts(rendered: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        rule
        for spec in rendered.values()
        for group in spec["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
