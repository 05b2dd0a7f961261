"""Which series show under a second name: that of vLLM, for boards, autoscalers and endpoint pickers
made for it. Data only.

A second name costs nothing where values are measured: `baton.telemetry` renders it from the values
of the first when it is scraped. Names and labels are as in vLLM (its docs: usage/metrics), buckets
are ours, which quantiles do not mind.

    model_name   the model
    engine       the worker; "router" for what is measured there; the pool for prefix-cache counters
    pool         prefill, decode or router; vLLM has no such label

Differences in meaning: `num_requests_waiting` has what waits in the router beside what waits on
each worker; a request that is handed over is `num_requests_running` on each worker while it is in
the batch there; `nixl_*` are of one request's hand-off over any link.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core import metrics as series
from baton.core.metrics import Series

Pairs = tuple[tuple[str, str], ...]

_ROUTER: Pairs = (("engine", "router"), ("pool", "router"))
_WORKER: Pairs = (("model_name", "model"), ("engine", "worker"), ("pool", "role"))


@dataclass(frozen=True, slots=True)
class VllmName:
    """A family of vLLM's with the values of one of ours. Several may share a name."""

    name: str
    of: Series
    labels: Pairs = (("model_name", "model"),)
    """Theirs and ours. `model` of a series with workers but without models is looked up in
    `WORKER_INFO`."""
    fixed: Pairs = ()
    """Labels that always have the same value."""
    renamed: Pairs = ()
    """Values of labels, ours and theirs."""


def _of_request(name: str, of: Series) -> VllmName:
    return VllmName(name, of, fixed=_ROUTER)


def _of_worker(name: str, of: Series) -> VllmName:
    return VllmName(name, of, _WORKER)


def _of_pool(name: str, of: Series) -> VllmName:
    return VllmName(name, of, (("model_name", "model"), ("engine", "role"), ("pool", "role")))


VLLM_NAMES: tuple[VllmName, ...] = (
    _of_worker("vllm:num_requests_running", series.WORKER_RUNNING),
    _of_worker("vllm:num_requests_waiting", series.WORKER_WAITING),
    _of_request("vllm:num_requests_waiting", series.WAITING),
    _of_worker("vllm:kv_cache_usage_perc", series.WORKER_KV_USAGE),
    # Until 0.10; boards and scalers that are about still ask for it.
    _of_worker("vllm:gpu_cache_usage_perc", series.WORKER_KV_USAGE),
    _of_worker("vllm:num_preemptions_total", series.WORKER_PREEMPTIONS),
    VllmName(
        "vllm:cache_config_info",
        series.WORKER_INFO,
        (
            *_WORKER,
            ("block_size", "block_size"),
            ("num_gpu_blocks", "num_blocks"),
            ("cache_dtype", "kv_dtype"),
        ),
    ),
    _of_pool("vllm:prefix_cache_queries_total", series.PREFIX_QUERY_TOKENS),
    _of_pool("vllm:prefix_cache_hits_total", series.PREFIX_HIT_TOKENS),
    _of_request("vllm:prompt_tokens_total", series.PROMPT_TOKENS),
    _of_request("vllm:prompt_tokens_cached_total", series.CACHED_TOKENS),
    _of_request("vllm:generation_tokens_total", series.GENERATION_TOKENS),
    VllmName(
        "vllm:request_success_total",
        series.REQUESTS,
        (("model_name", "model"), ("finished_reason", "finish_reason")),
        fixed=_ROUTER,
        renamed=(("cancelled", "abort"),),
    ),
    _of_request("vllm:time_to_first_token_seconds", series.TTFT),
    _of_request("vllm:inter_token_latency_seconds", series.ITL),
    # The older name of the same.
    _of_request("vllm:time_per_output_token_seconds", series.ITL),
    _of_request("vllm:request_time_per_output_token_seconds", series.MEAN_ITL),
    _of_request("vllm:e2e_request_latency_seconds", series.E2E),
    _of_request("vllm:request_queue_time_seconds", series.QUEUE),
    _of_request("vllm:request_prefill_time_seconds", series.PREFILL),
    _of_request("vllm:request_decode_time_seconds", series.DECODE),
    _of_request("vllm:request_prompt_tokens", series.REQUEST_PROMPT_TOKENS),
    _of_request("vllm:request_generation_tokens", series.REQUEST_GENERATION_TOKENS),
    _of_request("vllm:nixl_xfer_time_seconds", series.TRANSFER),
    _of_request("vllm:nixl_bytes_transferred", series.TRANSFER_BYTES),
    _of_worker("vllm:nixl_num_failed_transfers_total", series.KV_FAILED_READS),
    _of_worker("vllm:nixl_num_kv_expired_reqs_total", series.KV_EXPIRED_LEASES),
)
