"""What /metrics of a running disaggregated system shows, before and after traffic."""

from __future__ import annotations

import itertools

import httpx
import pytest

from baton.core.metrics import ALL_SERIES, Kind
from baton.core.vllm_metrics import VLLM_NAMES
from observed import MODEL, PROMPT

NEEDS_AN_EVENT = {
    # Appear with what they speak of.
    "baton_router_breaker_open", "baton_router_kv_unmatched",
    "baton_kv_tier_blocks", "baton_kv_tier_bytes", "baton_kv_tier_max_bytes",
    "baton_admission_tenant_queue_requests",
}  # fmt: skip
PROCESS = ("process_", "python_")


def test_families_whose_labels_are_known_are_there_before_any_request(observed):
    known = {"model": (MODEL,), "slo_class": ("interactive", "standard", "batch")}
    early = [s for s in ALL_SERIES if s.label_sets(known)]
    assert len(early) > 50
    assert [s.name for s in early if s.name not in observed.first_scrape.shown] == []
    for s in early:
        suffix = "_count" if s.kind is Kind.HISTOGRAM else ""
        for values in s.label_sets(known):
            labels = dict(zip(s.labels, values, strict=True))
            assert (s.name + suffix, frozenset(labels.items())) in observed.first_scrape.values
    first = observed.first_scrape
    router = {"model_name": MODEL, "engine": "router", "pool": "router"}
    assert first.value("vllm:num_requests_waiting", **router) == 0
    assert first.value("baton_tenant_prompt_tokens_total", tenant="anonymous") == 0


def test_nothing_is_shown_that_is_not_declared(observed):
    declared = {s.name for s in ALL_SERIES} | {n.name for n in VLLM_NAMES}
    unknown = {n for n in observed.first_scrape.shown - declared if not n.startswith(PROCESS)}
    assert unknown == set()
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"} <= (
        observed.first_scrape.shown
    )


def test_after_a_little_traffic_every_family_is_there(observed):
    observed.complete(x_slo_class="interactive")
    observed.complete()
    expected = {s.name for s in ALL_SERIES} - NEEDS_AN_EVENT | {n.name for n in VLLM_NAMES}
    seen = observed.scrape_when(lambda seen: expected <= seen.shown)
    for s in ALL_SERIES:
        allowed = dict(s.values)
        for name, labels in seen.values:
            if name == s.name:
                assert all(v in allowed[k] for k, v in labels if k in allowed), (name, labels)


def test_names_of_vllm_have_the_values_of_ours(observed):
    observed.complete()
    seen = observed.scrape()
    router = {"model_name": MODEL, "engine": "router", "pool": "router"}
    for theirs, ours in (
        ("vllm:time_to_first_token_seconds", "baton_time_to_first_token_seconds"),
        ("vllm:inter_token_latency_seconds", "baton_inter_token_latency_seconds"),
        ("vllm:time_per_output_token_seconds", "baton_inter_token_latency_seconds"),
    ):
        for part in ("_count", "_sum"):
            assert seen.value(theirs + part, **router) == seen.value(ours + part, model=MODEL) > 0
        bounds = {
            le for n, ls in seen.values if n == theirs + "_bucket" for k, le in ls if k == "le"
        }
        assert "+Inf" in bounds and len(bounds) > 20
    assert seen.value("vllm:request_success_total", **router, finished_reason="length") > 0
    assert seen.value("vllm:request_success_total", **router, finished_reason="abort") >= 0
    decode = str(observed.system.worker("decode").worker_id)
    worker = {"model_name": MODEL, "engine": decode, "pool": "decode"}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
                 "gpu_cache_usage_perc"):  # fmt: skip
        assert 0 <= seen.value(f"vllm:{name}", **worker) <= 1
    (config,) = (ls for n, ls in seen.values if n == "vllm:cache_config_info"
                 and ("engine", decode) in ls)  # fmt: skip
    info = observed.system.worker("decode")
    assert dict(config)["num_gpu_blocks"] == str(info.num_blocks)
    assert dict(config)["block_size"] == str(info.layout.block_size)


def test_engine_time_of_tenants_is_the_time_that_engines_were_busy(observed):
    before = observed.settled()
    busy_s, charged_s = before.busy_seconds, before.engine_seconds()
    for _ in range(3):
        observed.complete(x_tenant_id="payer")
    # A stop string ends a request in the router; its worker tells the rest later.
    text = str(observed.complete({"seed": 5})["text"])
    stopped = observed.complete({"stop": text[10:14], "max_tokens": 200, "seed": 5})
    assert stopped["finish_reason"] == "stop"
    # And so it does of one whose client leaves.
    body = observed.body(max_tokens=400, stream=True)
    url, leaver = observed.completions_url, {"x-tenant-id": "leaver"}
    with httpx.stream("POST", url, json=body, headers=leaver, trust_env=False) as response:
        # Past the first token, which the prefill worker makes.
        assert len(list(itertools.islice(response.iter_lines(), 12))) == 12
    seen = observed.settled()
    spent_s = seen.busy_seconds - busy_s
    assert spent_s > 0
    assert seen.engine_seconds() - charged_s == pytest.approx(spent_s, rel=0.02)
    assert seen.engine_seconds(tenant="leaver", role="decode") > 0
    assert seen.value("baton_tenant_requests_total", tenant="leaver") == 1
    for role in ("prefill", "decode"):
        assert seen.engine_seconds(tenant="payer", role=role) > 0
    assert seen.value("baton_tenant_requests_total", tenant="payer") == 3
    assert seen.value("baton_tenant_generation_tokens_total", tenant="payer") == 36
    assert seen.value("baton_tenant_prompt_tokens_total", tenant="payer") == 3 * len(PROMPT)


def test_tokens_are_counted_while_a_request_runs(observed):
    body = observed.body(max_tokens=400, stream=True)
    name = "baton_generation_tokens_total"
    before = observed.scrape().total(name)
    url = observed.completions_url
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        lines = response.iter_lines()
        next(lines)
        # What is left of the stream waits in sockets; the router's count does not.
        observed.scrape_when(lambda seen: seen.total(name) > before)
    observed.system.assert_nothing_leaked()


def test_tenants_beyond_the_first_twenty_share_a_label(observed):
    for i in range(24):
        observed.complete({"max_tokens": 1}, x_tenant_id=f"crowd-{i}")
    seen = observed.scrape()
    for s in ALL_SERIES:
        if "tenant" in s.labels:
            labels = {v for n, ls in seen.values if n == s.name for k, v in ls if k == "tenant"}
            assert len(labels) <= 21
    assert seen.value("baton_tenant_requests_total", tenant="other") >= 4


def test_goodput_counts_requests_that_kept_their_targets_and_no_others(observed):
    labels = {"model": MODEL, "slo_class": "standard"}
    before = observed.scrape()
    observed.complete(x_slo_ttft_ms="60000")
    observed.complete({"max_tokens": 5}, x_slo_ttft_ms="0.001")
    after = observed.scrape()

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert grown("baton_goodput_requests_total", **labels) == 1
    assert grown("baton_goodput_tokens_total", **labels) == 12
    slo = {"slo_class": "standard", "objective": "all"}
    assert grown("baton_slo_requests_total", **slo, result="met") == 1
    assert grown("baton_slo_requests_total", **slo, result="missed") == 1
