"""Where the chart and the values files of its tests are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/baton"
TESTS = ROOT / "tests/deploy"
PROFILES = sorted(path.name for path in CHART.glob("values-*.yaml"))
OTHERS = sorted(path.name for path in TESTS.glob("values-*.yaml"))
SECRET = {"secrets": {"clusterSecret": "0123456789abcdef0123456789abcdef"}}

Objects = Sequence[dict[str, Any]]


def values_file(name: str) -> Path:
    return next(path for path in (CHART / name, TESTS / name) if path.is_file())


def extra_values(name: str) -> dict[str, Any]:
    """What a values file leaves to whoever installs it."""
    return {} if name in OTHERS or name == "values-production.yaml" else SECRET
