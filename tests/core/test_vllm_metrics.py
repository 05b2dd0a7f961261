"""Second names are families of vLLM's, with labels that the first ones can fill."""

import pytest

from baton.core.metrics import ALL_SERIES, Kind
from baton.core.vllm_metrics import VLLM_NAMES

WANTED = {
    # What boards, KEDA examples and endpoint pickers made for vLLM ask for.
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc",
    "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "prompt_tokens_total", "generation_tokens_total",
    "request_success_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
    "num_preemptions_total", "cache_config_info", "request_prompt_tokens",
    "request_generation_tokens",
}  # fmt: skip


def test_wanted_names_are_there():
    assert {f"vllm:{name}" for name in WANTED} <= {n.name for n in VLLM_NAMES}


@pytest.mark.parametrize("second", VLLM_NAMES, ids=lambda n: f"{n.name} {n.of.name}")
def test_labels_can_be_filled(second):
    assert second.of in ALL_SERIES
    shown = [theirs for theirs, _ in (*second.labels, *second.fixed)]
    assert len(set(shown)) == len(shown)
    assert {"model_name", "engine", "pool"} <= set(shown)
    of_worker = second.of.labels[:2] == ("role", "worker")
    for _, ours in second.labels:
        assert ours in second.of.labels or (ours == "model" and of_worker)
    assert second.name.endswith("_total") is (second.of.kind is Kind.COUNTER)


def test_families_of_one_name_have_the_same_kind_and_labels():
    by_name = {}
    for n in VLLM_NAMES:
        labels = frozenset(theirs for theirs, _ in (*n.labels, *n.fixed))
        assert by_name.setdefault(n.name, (n.of.kind, labels)) == (n.of.kind, labels)
