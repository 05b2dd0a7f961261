from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from baton.core import metrics as series
from baton.telemetry.metrics import Metrics


def samples(metrics):
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for s in family.samples
    }


def test_every_declared_series_can_be_rendered():
    metrics = Metrics()
    for s in series.ALL_SERIES:
        labels = ["x"] * len(s.labels)
        if s.kind is series.Kind.HISTOGRAM:
            metrics.observe(s, 0.5, *labels)
        else:
            metrics.add(s, 1, *labels)
    text = metrics.render().decode()
    families = {f.name for f in text_string_to_metric_families(text)}
    for s in series.ALL_SERIES:
        assert s.name.removesuffix("_total") in families


def test_every_declared_series_is_documented():
    text = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    assert [s.name for s in series.ALL_SERIES if f"`{s.name}`" not in text] == []


def test_histogram_counts_are_cumulative_and_bounds_inclusive():
    metrics = Metrics()
    for value in (0.001, 0.0011, 0.05, 100.0):
        metrics.observe(series.ITL, value, "m")
    metrics.observer(series.ITL, "m")(0.05)
    found = samples(metrics)
    name = series.ITL.name
    assert found[name + "_bucket", (("le", "0.001"), ("model", "m"))] == 1
    assert found[name + "_bucket", (("le", "0.0025"), ("model", "m"))] == 2
    assert found[name + "_bucket", (("le", "0.05"), ("model", "m"))] == 4
    assert found[name + "_bucket", (("le", "5.0"), ("model", "m"))] == 4
    assert found[name + "_bucket", (("le", "+Inf"), ("model", "m"))] == 5
    assert found[name + "_count", (("model", "m"),)] == 5
    assert abs(found[name + "_sum", (("model", "m"),)] - 100.1021) < 1e-9


def test_gauges_are_set_moved_and_removed():
    metrics = Metrics()
    metrics.add(series.RUNNING, 1)
    metrics.add(series.RUNNING, -1)
    metrics.set(series.WORKER_RUNNING, 3, "decode", "d0")
    metrics.set(series.WORKER_RUNNING, 4, "decode", "d1")
    metrics.remove(series.WORKER_RUNNING, "decode", "d0")
    metrics.remove(series.WORKER_RUNNING, "decode", "never")
    metrics.remove(series.RUNNING)
    found = samples(metrics)
    assert found["baton_requests_running", ()] == 0
    key = (("role", "decode"), ("worker", "d1"))
    assert found["baton_worker_requests_running", key] == 4
    assert b"d0" not in metrics.render()
    metrics.set(series.WORKER_RUNNING, 5, "decode", "d0")
    assert b'worker="d0"' in metrics.render()


def test_histogram_label_set_can_be_removed():
    metrics = Metrics()
    metrics.observe(series.TTFT, 1.0, "gone")
    metrics.remove(series.TTFT, "gone")
    assert b"gone" not in metrics.render()


def test_two_objects_share_nothing():
    one, two = Metrics(), Metrics()
    one.add(series.GENERATION_TOKENS, 5, "m")
    assert b'{model="m"}' not in two.render()
    assert one.content_type.startswith("text/plain")
