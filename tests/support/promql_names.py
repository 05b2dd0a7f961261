"""Which series a PromQL expression asks for, and which labels of them, by a real parser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser

from baton.core.metrics import ALL_SERIES, Kind
from baton.core.planner_metrics import PLANNER_SERIES

SUFFIXES = ("_bucket", "_sum", "_count")
ADDED_BY_SCRAPE = {"job", "instance", "namespace", "pod", "service", "endpoint", "container"}
OTHERS = {
    "up": set[str](),
    "ALERTS": {"alertname", "alertstate", "severity"},
    "process_cpu_seconds_total": set[str](),
}
"""Series of Prometheus itself and of every process, with labels."""


def selectors(expr: str) -> list[tuple[str, set[str]]]:
    """(series, labels that its matchers and the aggregations above it name), in any order.

    Raises ValueError for what is no PromQL.
    """
    return list(_selectors(promql_parser.parse(expr), frozenset()))


def known_series() -> dict[str, set[str]]:
    """Every name that a scrape of a router or a planner has, with its labels."""
    known = {**OTHERS}
    for series in (*ALL_SERIES, *PLANNER_SERIES):
        names = [series.name]
        if series.kind is Kind.HISTOGRAM:
            names = [f"{series.name}{suffix}" for suffix in SUFFIXES]
        for name in names:
            known[name] = {*series.labels, *(("le",) if name.endswith("_bucket") else ())}
    return known


def _selectors(node: Any, above: frozenset[str]) -> Iterator[tuple[str, set[str]]]:
    if isinstance(node, promql_parser.MatrixSelector):
        node = node.vector_selector
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {*above, *(matcher.name for matcher in node.matchers.matchers)}
        return
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        # What an inner aggregation has dropped an outer one cannot name.
        above = frozenset({*above, *node.modifier.labels})
    inner = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "param")]
    for part in (*inner, *(getattr(node, "args", None) or ())):
        if part is not None:
            yield from _selectors(part, above)
