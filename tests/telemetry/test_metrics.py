from __future__ import annotations

import re

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.core import metrics as series
from baton.core.planner_metrics import PLANNER_SERIES
from baton.core.vllm_metrics import VLLM_NAMES
from baton.telemetry.metrics import Metrics
from tools import metrics_table


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


def test_documentation_has_every_series_and_no_other():
    """`python -m tools.metrics_table` makes it so."""
    text = metrics_table.PAGE.read_text()
    assert metrics_table.page(text) == text
    rows = re.findall(r"^\| `((?:baton_|vllm:)\w+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(
        [*(s.name for s in (*series.ALL_SERIES, *PLANNER_SERIES)), *(n.name for n in VLLM_NAMES)]
    )
    named = set(re.findall(r"\b(baton_[a-z_]+[a-z])\b", text))
    known = {s.name for s in (*series.ALL_SERIES, *PLANNER_SERIES)}
    histograms = {s.name for s in series.ALL_SERIES if s.kind is series.Kind.HISTOGRAM}
    parts = {h + part for h in histograms for part in ("_sum", "_count", "_bucket")}
    assert named - known - parts - {"baton_tenant"} == set()


def test_queries_of_the_documentation_are_queries():
    text = metrics_table.PAGE.read_text()
    table = text[text.index("## What to look at") : text.index("## Series")]
    rows = [line.split(" | ", 1)[1] for line in table.splitlines() if line.startswith("| ")][1:]
    queries = [query for row in rows for query in re.findall(r"`([^`]+)`", row)]
    assert len(queries) >= 8
    for query in queries:
        promql_parser.parse(query)


def test_families_with_known_labels_are_there_from_the_start():
    metrics = Metrics(known={"model": ("m", "n"), "slo_class": ("fast",)})
    found = samples(metrics)
    for labels in ((("model", "m"),), (("model", "n"),)):
        assert found[series.TTFT.name + "_count", labels] == 0
        assert found[series.TTFT.name + "_bucket", (("le", "+Inf"), *labels)] == 0
    assert found[series.KV_EVENT_FAULTS.name, (("reason", "gap"),)] == 0
    slo = [labels for name, labels in found if name == series.SLO_REQUESTS.name]
    assert len(slo) == 6
    assert found[series.SESSION_FAULTS.name, ()] == 0
    assert not [name for name, _ in found if name.startswith("baton_worker_")]
    assert not [name for name, _ in samples(Metrics()) if name.startswith(series.TTFT.name)]


def test_equal_observations_are_added_at_once():
    one, many = Metrics(), Metrics()
    for _ in range(5):
        one.observe(series.ITL, 0.03, "m")
    many.observer(series.ITL, "m")(0.03, 5)
    assert samples(one) == samples(many)


def test_second_names_have_the_same_values():
    metrics = Metrics(second_names=VLLM_NAMES)
    metrics.set(series.WORKER_INFO, 1, "decode", "d0", "m", "16", "99", "bfloat16", "512", "f")
    metrics.set(series.WORKER_WAITING, 3, "decode", "d0")
    metrics.set(series.WAITING, 4, "m")
    metrics.add(series.REQUESTS, 2, "m", "cancelled")
    metrics.observe(series.TTFT, 0.05, "m")
    found = samples(metrics)

    def value(name, **labels):
        return found[name, tuple(sorted(({"model_name": "m"} | labels).items()))]

    router = {"engine": "router", "pool": "router"}
    decode = {"engine": "d0", "pool": "decode"}
    assert value("vllm:num_requests_waiting", **decode) == 3
    assert value("vllm:num_requests_waiting", **router) == 4
    assert value("vllm:request_success_total", finished_reason="abort", **router) == 2
    assert value("vllm:time_to_first_token_seconds_sum", **router) == 0.05
    assert value("vllm:time_to_first_token_seconds_bucket", le="0.04", **router) == 0
    assert value("vllm:time_to_first_token_seconds_bucket", le="0.06", **router) == 1
    config = {"block_size": "16", "num_gpu_blocks": "99", "cache_dtype": "bfloat16"}
    assert value("vllm:cache_config_info", **decode, **config) == 1
    names = [f.name for f in text_string_to_metric_families(metrics.render().decode())]
    assert len(set(names)) == len(names)


def test_second_name_follows_a_worker_that_leaves():
    metrics = Metrics(second_names=VLLM_NAMES)
    metrics.set(series.WORKER_RUNNING, 3, "decode", "d0")
    assert b'vllm:num_requests_running{engine="d0"' in metrics.render()
    metrics.remove(series.WORKER_RUNNING, "decode", "d0")
    assert b'engine="d0"' not in metrics.render()


def test_worker_that_comes_back_with_another_model_is_shown_with_it():
    metrics = Metrics(second_names=VLLM_NAMES)
    metrics.set(series.WORKER_RUNNING, 3, "decode", "d0")
    for model in ("old", "new"):
        info = ("decode", "d0", model, "16", "99", "bfloat16", "512", "f")
        metrics.set(series.WORKER_INFO, 1, *info)
        running = f'vllm:num_requests_running{{engine="d0",model_name="{model}",pool="decode"}} 3.0'
        assert running in metrics.render().decode()
        metrics.remove(series.WORKER_INFO, *info)


def test_values_from_clients_cannot_break_the_format():
    metrics = Metrics()
    nasty = 'a"} 1\n\\evil{x="é'
    metrics.add(series.TENANT_WORK, 2, nasty)
    assert samples(metrics)[series.TENANT_WORK.name, (("tenant", nasty),)] == 2
    assert len(re.findall(rb"^evil", metrics.render(), re.MULTILINE)) == 0


def test_process_is_shown_where_it_is_asked_for():
    assert b"process_resident_memory_bytes" in Metrics(shows_process=True).render()
    assert b"process_" not in Metrics().render()


def test_wrong_labels_are_a_defect():
    with pytest.raises(AssertionError, match="has the labels"):
        Metrics().add(series.REQUESTS, 1, "m")
    with pytest.raises(AssertionError, match="is no gauge"):
        Metrics().set(series.REQUESTS, 1, "m", "stop")


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
