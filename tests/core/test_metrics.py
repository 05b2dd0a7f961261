"""The declarations follow the conventions that dashboards and rules rely on."""

from __future__ import annotations

import pytest

from baton.core.metrics import ALL_SERIES, Kind
from baton.core.planner_metrics import PLANNER_SERIES

EVERY_SERIES = (*ALL_SERIES, *PLANNER_SERIES)
by_name = pytest.mark.parametrize("series", EVERY_SERIES, ids=lambda s: s.name)


def test_names_are_unique():
    assert len({s.name for s in EVERY_SERIES}) == len(EVERY_SERIES)


@by_name
def test_name_carries_project_and_unit(series):
    assert series.name.startswith("baton_")
    assert series.help.endswith(".")
    if series.kind is Kind.COUNTER:
        assert series.name.endswith("_total")
    elif series.kind is Kind.HISTOGRAM:
        assert series.name.endswith(("_seconds", "_bytes", "_tokens", "_ratio"))
    else:
        assert not series.name.endswith("_total")


@by_name
def test_labels_come_from_closed_sets(series):
    closed = {
        "model", "role", "worker", "status", "kind", "finish_reason", "source", "reason",
        "transport", "result", "code", "route", "peer", "lane", "tier", "slo_class", "objective",
        "tenant", "quantity", "backend", "answer", "direction", "state", "since", "version",
        "fingerprint", "block_size", "num_blocks", "kv_dtype", "max_model_len",
        "pool", "term", "when", "target", "stage",
    }  # fmt: skip
    assert set(series.labels) <= closed


@by_name
def test_histograms_have_rising_buckets_and_nothing_else_has_any(series):
    if series.kind is Kind.HISTOGRAM:
        assert len(series.buckets) >= 8
        assert list(series.buckets) == sorted(set(series.buckets))
    else:
        assert not series.buckets
