"""The chart's rules as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chart import CHART

RULES = CHART / "files/rules"


@dataclass(frozen=True, slots=True)
class Rule:
    """One recording rule or alert."""

    name: str
    expr: str
    is_alert: bool
    body: dict[str, Any]


def read_rules(folder: Path = RULES) -> list[Rule]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [
        Rule(rule.get("alert") or rule["record"], rule["expr"], "alert" in rule, rule)
        for file in sorted(folder.glob("*.yaml"))
        for group in yaml.load(file.read_text(), loader)["groups"]
        for rule in group["rules"]
    ]
