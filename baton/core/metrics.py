"""Every Prometheus series of the project, declared once. Data only: no client library here.

`baton.telemetry` turns these into live series; `baton.core.vllm_metrics` says which of them show
under a second name. Names carry their unit; label values must come from small closed sets (roles,
worker ids, reasons), never from a request.

A family all of whose label values are known beforehand (`Series.values`, and models and classes of
service from the settings) is there from the start with zeros, so that no panel or alert is empty
for want of traffic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
)  # fmt: skip
REFUSAL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
ITL_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
RATIO_BUCKETS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
BYTES_BUCKETS = tuple(4**n * 1024 for n in range(12))


REQUEST_TOKEN_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000,
)  # fmt: skip

Values = tuple[tuple[str, tuple[str, ...]], ...]
"""Labels and all the values they can take."""
ROLES = (("role", ("prefill", "decode")),)
FINISH_REASONS = (("finish_reason", ("stop", "length", "cancelled", "error")),)


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Series:
    """One metric family."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    values: Values = ()
    """Of labels whose values this project decides."""

    def label_sets(self, known: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
        """All its label sets if they are known beforehand, by `values` or `known`; else none."""
        of_label = {**known, **dict(self.values)}
        if not of_label.keys() >= set(self.labels):
            return []
        return list(product(*(of_label[label] for label in self.labels)))


def _seconds(name: str, help: str, *, buckets: tuple[float, ...] = LATENCY_BUCKETS_S) -> Series:
    return Series(name, Kind.HISTOGRAM, help, ("model",), buckets)


TTFT = _seconds("baton_time_to_first_token_seconds", "Arrival to first token at the router.")
ITL = _seconds(
    "baton_inter_token_latency_seconds",
    "Gap between two successive tokens of one request at the router.",
    buckets=ITL_BUCKETS_S,
)
E2E = _seconds("baton_e2e_request_latency_seconds", "Arrival to last token at the router.")
QUEUE = _seconds(
    "baton_request_queue_seconds", "On the worker that computes the prompt, until its first chunk."
)
PREFILL = _seconds("baton_request_prefill_seconds", "First prefill chunk to first token.")
DECODE = _seconds("baton_request_decode_seconds", "First decode step to last token.")
MEAN_ITL = _seconds(
    "baton_request_mean_itl_seconds",
    "Mean time between the tokens of one request at the router: what its objective is about.",
    buckets=ITL_BUCKETS_S,
)
REQUEST_PROMPT_TOKENS = Series(
    "baton_request_prompt_tokens", Kind.HISTOGRAM, "Prompt tokens of a finished request.",
    ("model",), REQUEST_TOKEN_BUCKETS,
)  # fmt: skip
REQUEST_GENERATION_TOKENS = Series(
    "baton_request_generation_tokens", Kind.HISTOGRAM, "Output tokens of a finished request.",
    ("model",), REQUEST_TOKEN_BUCKETS,
)  # fmt: skip
REQUEST_ENGINE = Series(
    "baton_request_engine_seconds", Kind.HISTOGRAM,
    "A request's share of the engine steps it took part in, by its tokens in each, times the "
    "worker's ranks: GPU-seconds where these are GPUs.",
    ("model", "role"), LATENCY_BUCKETS_S, ROLES,
)  # fmt: skip
TRANSFER = _seconds(
    "baton_kv_transfer_seconds", "Time with KV reads of a request in flight, measured."
)
TRANSFER_EXPOSED = _seconds(
    "baton_kv_transfer_exposed_seconds", "Part of the KV transfer after prefill had ended."
)
TRANSFER_BYTES = Series(
    "baton_kv_transfer_bytes", Kind.HISTOGRAM, "KV bytes read for one request.", ("model",),
    BYTES_BUCKETS,
)  # fmt: skip
TRANSFER_HIDDEN = Series(
    "baton_kv_transfer_hidden_ratio", Kind.HISTOGRAM,
    "Share of a request's KV transfer during which its prompt was still computed, 0 to 1.",
    ("model",), RATIO_BUCKETS,
)  # fmt: skip
MIGRATION_PAUSE = _seconds(
    "baton_migration_pause_seconds",
    "Gap between a request's last token from its old worker and its first from the new one.",
    buckets=ITL_BUCKETS_S,
)
MIGRATIONS = Series(
    "baton_migrations_total",
    Kind.COUNTER,
    "Moves of running requests by reason (drain, pressure) and result: moved, failed, or void "
    "when the request ended meanwhile.",
    ("reason", "result"),
    values=(("reason", ("drain", "pressure")), ("result", ("moved", "failed", "void"))),
)
PERF_ERROR = Series(
    "baton_perf_model_error_ratio",
    Kind.GAUGE,
    "Mean share by which recent measurements differ from what the router's performance model "
    "predicts: prefill and itl of workers of a role, ttft of requests whose prompt they computed.",
    ("quantity", "role"),
)
PREFIX_OFFERS = Series(
    "baton_prefix_offers_total",
    Kind.COUNTER,
    "Prompts sent with the name of another worker that caches more of them; "
    "`baton_kv_fetched_blocks_total` says what came of it.",
    ("role",),
    values=ROLES,
)
PROMPT_TOKENS = Series(
    "baton_prompt_tokens_total", Kind.COUNTER, "Prompt tokens of finished requests.", ("model",)
)
CACHED_TOKENS = Series(
    "baton_prompt_cached_tokens_total",
    Kind.COUNTER,
    "Prompt tokens whose KV was found in a cache.",
    ("model",),
)
GENERATION_TOKENS = Series(
    "baton_generation_tokens_total", Kind.COUNTER, "Tokens sent to clients.", ("model",)
)
REQUESTS = Series(
    "baton_requests_total",
    Kind.COUNTER,
    "Finished requests by how they ended: stop, length, cancelled or error.",
    ("model", "finish_reason"),
    values=FINISH_REASONS,
)
REJECTED = Series(
    "baton_requests_rejected_total",
    Kind.COUNTER,
    "Requests refused before any work, by HTTP status.",
    ("status",),
    values=(
        (
            "status",
            ("400", "401", "404", "405", "408", "413", "429", "431", "500", "503", "504"),
        ),
    ),
)
SLOW_CLIENTS = Series(
    "baton_router_slow_clients_total",
    Kind.COUNTER,
    "Requests given up because nobody read their output (`dispatch.slow_client_s`).",
)
RETRIES_REFUSED = Series(
    "baton_router_retries_refused_total",
    Kind.COUNTER,
    "Requests that failed on a worker and were not placed again: `retry.*` was spent.",
)
BREAKER_OPEN = Series(
    "baton_router_breaker_open",
    Kind.GAUGE,
    "1 while the worker rests because too many of its last requests failed: `breaker.*`.",
    ("worker",),
)
PLACEMENTS = Series(
    "baton_placements_total",
    Kind.COUNTER,
    "Placement decisions: remote_prefill, local_prefill, prefill_only, replay.",
    ("kind",),
    values=(("kind", ("remote_prefill", "local_prefill", "prefill_only", "replay")),),
)
INDEX_ENTRIES = Series(
    "baton_router_prefix_entries",
    Kind.GAUGE,
    "Distinct KV blocks in the prefix index; the least used go at `index.max_entries`.",
)
KV_UNMATCHED = Series(
    "baton_router_kv_unmatched",
    Kind.GAUGE,
    "1 while the worker's KV events are not used and it is placed by load alone; the log says why.",
    ("worker",),
)
KV_EVENT_FAULTS = Series(
    "baton_router_kv_event_faults_total",
    Kind.COUNTER,
    "What was wrong with workers' KV events: gap, replayed, malformed, too_large, hashing.",
    ("reason",),
    values=(("reason", ("gap", "replayed", "malformed", "too_large", "hashing")),),
)
SESSION_FAULTS = Series(
    "baton_router_session_faults_total",
    Kind.COUNTER,
    "Sessions ended because of what the worker sent: undecodable, no Welcome, impossible values.",
)
RUNNING = Series("baton_requests_running", Kind.GAUGE, "Requests in the router.", ())
WAITING = Series(
    "baton_requests_waiting", Kind.GAUGE, "Requests waiting in the router to be placed.",
    ("model",),
)  # fmt: skip
GOODPUT_REQUESTS = Series(
    "baton_goodput_requests_total",
    Kind.COUNTER,
    "Requests that ran to their end and missed none of their targets; those without targets too.",
    ("model", "slo_class"),
)
GOODPUT_TOKENS = Series(
    "baton_goodput_tokens_total",
    Kind.COUNTER,
    "Tokens sent to the clients of those requests.",
    ("model", "slo_class"),
)
TENANT_REQUESTS = Series(
    "baton_tenant_requests_total",
    Kind.COUNTER,
    "Requests that had work done for them, however they ended.",
    ("tenant",),
)
TENANT_PROMPT_TOKENS = Series(
    "baton_tenant_prompt_tokens_total",
    Kind.COUNTER,
    "Prompt tokens of those requests.",
    ("tenant",),
)
TENANT_CACHED_TOKENS = Series(
    "baton_tenant_prompt_cached_tokens_total",
    Kind.COUNTER,
    "Part of them whose KV was found in a cache.",
    ("tenant",),
)
TENANT_GENERATION_TOKENS = Series(
    "baton_tenant_generation_tokens_total", Kind.COUNTER, "Tokens sent to clients.", ("tenant",)
)
TENANT_ENGINE = Series(
    "baton_tenant_engine_seconds_total",
    Kind.COUNTER,
    "Shares of engine steps times the worker's ranks, as measured by the workers: GPU-seconds "
    "where these are GPUs.",
    ("tenant", "role"),
)
ROUTER_READY = Series(
    "baton_router_ready", Kind.GAUGE, "1 while /health answers that the router is ready."
)
LOOP_LAG = Series(
    "baton_router_loop_lag_seconds",
    Kind.GAUGE,
    "How late the event loop came to a timer, at worst over the last ten seconds.",
)
BUILD_INFO = Series(
    "baton_build_info",
    Kind.GAUGE,
    "1, with the version and the fingerprint of what routers and workers must have in common: "
    "session protocol and block hashing.",
    ("version", "fingerprint"),
)
TRACE_SPANS = Series(
    "baton_trace_spans_total",
    Kind.COUNTER,
    "Spans by what became of them: exported; dropped, as too many were waiting; failed, as the "
    "collector did not take them.",
    ("result",),
    values=(("result", ("exported", "dropped", "failed")),),
)
WORKER_RUNNING = Series(
    "baton_worker_requests_running", Kind.GAUGE, "Sequences in the batch.", ("role", "worker")
)
WORKER_WAITING = Series(
    "baton_worker_requests_waiting", Kind.GAUGE, "Sequences not admitted yet.", ("role", "worker")
)
WORKER_KV_USAGE = Series(
    "baton_worker_kv_usage_ratio",
    Kind.GAUGE,
    "Share of KV blocks held by live sequences, 0 to 1.",
    ("role", "worker"),
)
WORKER_LEASES = Series(
    "baton_worker_kv_leases", Kind.GAUGE, "Live leases on a worker's blocks.", ("role", "worker")
)
WORKER_QUARANTINED = Series(
    "baton_worker_kv_quarantined_blocks",
    Kind.GAUGE,
    "Blocks a given-up read may still write to.",
    ("role", "worker"),
)
WORKER_PREEMPTIONS = Series(
    "baton_worker_preemptions_total",
    Kind.COUNTER,
    "Sequences preempted for lack of KV blocks.",
    ("role", "worker"),
)


def _of_worker(name: str, kind: Kind, help: str, *labels: str) -> Series:
    return Series(name, kind, help, ("role", "worker", *labels))


WORKER_INFO = _of_worker(
    "baton_worker_info",
    Kind.GAUGE,
    "1, with what is fixed for the life of a worker; fingerprint is that of its KV layout.",
    "model", "block_size", "num_blocks", "kv_dtype", "max_model_len", "fingerprint",
)  # fmt: skip
WORKER_BLOCKS = _of_worker(
    "baton_worker_kv_blocks",
    Kind.GAUGE,
    "Blocks of the worker's pool by state: free, cached (given up when needed), held.",
    "state",
)
WORKER_BUSY = _of_worker(
    "baton_worker_busy_seconds_total", Kind.COUNTER, "Time the engine spent in steps."
)
WORKER_STEPS = _of_worker("baton_worker_steps_total", Kind.COUNTER, "Engine steps.")
LINK_INFO = _of_worker(
    "baton_kv_link_info",
    Kind.GAUGE,
    "1 for each peer a worker reads KV from, with the transport taken and what the link really "
    'does. transport="none": there is no link.',
    "peer", "transport", "lane",
)  # fmt: skip
LINK_RATE = _of_worker(
    "baton_kv_link_bytes_per_second", Kind.GAUGE, "Of the last timed reads from a peer.", "peer"
)
LINK_LATENCY = _of_worker(
    "baton_kv_link_latency_seconds", Kind.GAUGE, "Median read of one block from a peer.", "peer"
)
TIER_BLOCKS = _of_worker(
    "baton_kv_tier_blocks", Kind.GAUGE, "Blocks kept outside the pool, by tier.", "tier"
)
TIER_BYTES = _of_worker("baton_kv_tier_bytes", Kind.GAUGE, "Bytes in use of a tier.", "tier")
TIER_MAX_BYTES = _of_worker("baton_kv_tier_max_bytes", Kind.GAUGE, "Size of a tier.", "tier")
KV_READS = _of_worker("baton_kv_reads_total", Kind.COUNTER, "Reads from peers.")
KV_READ_BYTES = _of_worker("baton_kv_read_bytes_total", Kind.COUNTER, "Bytes read from peers.")
KV_FAILED_READS = _of_worker(
    "baton_kv_failed_reads_total", Kind.COUNTER, "Reads that failed or were given up."
)
KV_EXPIRED_LEASES = _of_worker(
    "baton_kv_expired_leases_total",
    Kind.COUNTER,
    "Leases whose reader went silent or did not come back; should stay at 0.",
)
KV_RECYCLES = _of_worker(
    "baton_kv_recycles_total",
    Kind.COUNTER,
    "Times a transport was restarted to end lost reads; should stay at 0.",
)
KV_REFUSED_PEERS = _of_worker(
    "baton_kv_refused_peers_total",
    Kind.COUNTER,
    "Connections refused to other workers; should stay at 0.",
)
KV_FETCHED_BLOCKS = _of_worker(
    "baton_kv_fetched_blocks_total", Kind.COUNTER, "Blocks read from peers' prefix caches."
)
KV_SAVED_BLOCKS = _of_worker(
    "baton_kv_saved_blocks_total", Kind.COUNTER, "Blocks written to tiers."
)
KV_RESTORED_BLOCKS = _of_worker(
    "baton_kv_restored_blocks_total", Kind.COUNTER, "Blocks read back from tiers."
)
KV_CORRUPT_BLOCKS = _of_worker(
    "baton_kv_corrupt_blocks_total", Kind.COUNTER, "Tier entries dropped for a wrong checksum."
)
KV_TAKEOVERS = _of_worker(
    "baton_kv_takeovers_total", Kind.COUNTER, "Running requests a worker took over from others."
)
KV_FAILED_TAKEOVERS = _of_worker(
    "baton_kv_failed_takeovers_total", Kind.COUNTER, "Takeovers after which the old worker went on."
)
KV_TAKEOVER_PAUSE = _of_worker(
    "baton_kv_takeover_pause_seconds_total",
    Kind.COUNTER,
    "Sum over takeovers, from asking the old worker to stop until its KV was here and valid.",
)
WORKERS = Series(
    "baton_workers", Kind.GAUGE, "Live workers seen by this router.", ("role",), values=ROLES
)
ROLE_CHANGES = Series(
    "baton_router_role_changes_total",
    Kind.COUNTER,
    "Workers that went over to another pool while this router knew them, by their new role.",
    ("role",),
    values=ROLES,
)
PREFIX_HIT_TOKENS = Series(
    "baton_prefix_cache_hit_tokens_total",
    Kind.COUNTER,
    "Prompt tokens found in a worker's prefix cache.",
    ("model", "role"),
    values=ROLES,
)
PREFIX_QUERY_TOKENS = Series(
    "baton_prefix_cache_query_tokens_total",
    Kind.COUNTER,
    "Prompt tokens looked up in a worker's prefix cache.",
    ("model", "role"),
    values=ROLES,
)
ADMISSIONS = Series(
    "baton_admissions_total",
    Kind.COUNTER,
    "Requests by what admission did: at_once or waited (admitted), or why they were sent away: "
    "ttft, itl, late, queue_full, pushed_out, no_worker.",
    ("slo_class", "result"),
    values=(
        (
            "result",
            ("at_once", "waited", "ttft", "itl", "late", "queue_full", "pushed_out", "no_worker"),
        ),
    ),
)
ADMISSION_WAIT = Series(
    "baton_admission_wait_seconds",
    Kind.HISTOGRAM,
    "Waiting in the router of requests that waited and were admitted.",
    ("slo_class",),
    LATENCY_BUCKETS_S,
)
ADMISSION_REFUSAL = Series(
    "baton_admission_refusal_seconds",
    Kind.HISTOGRAM,
    "Time to a refusal: since the request's arrival, for all that were refused; and for those that "
    "had been let wait, since the moment from which their turn could not come in time.",
    ("since",),
    REFUSAL_BUCKETS_S,
    (("since", ("arrival", "unreachable")),),
)
ADMISSION_QUEUE = Series(
    "baton_admission_queue_requests", Kind.GAUGE, "Requests waiting in the router.", ("slo_class",)
)
ADMISSION_OLDEST = Series(
    "baton_admission_queue_oldest_seconds",
    Kind.GAUGE,
    "Age of the oldest waiting request.",
    ("slo_class",),
)
ADMISSION_TENANT_QUEUE = Series(
    "baton_admission_tenant_queue_requests",
    Kind.GAUGE,
    "Requests waiting in the router, of the tenants with most of them; the others together.",
    ("tenant",),
)
ADMISSION_QUEUED_TOKENS = Series(
    "baton_admission_queue_tokens", Kind.GAUGE, "Work waiting in the router, in prompt tokens."
)
ADMISSION_SHEDDING = Series(
    "baton_admission_shedding", Kind.GAUGE, "1 while requests have been sent away lately."
)
ADMISSION_MARGIN = Series(
    "baton_admission_margin_seconds",
    Kind.GAUGE,
    "Added to predicted times, so that nearly all are on the safe side.",
    ("objective",),
    values=(("objective", ("ttft", "itl")),),
)
TENANT_WORK = Series(
    "baton_tenant_work_tokens_total",
    Kind.COUNTER,
    "Work of ended requests through both pools, in prompt tokens, of the first tenants seen; the "
    "others together.",
    ("tenant",),
)
SLO_REQUESTS = Series(
    "baton_slo_requests_total",
    Kind.COUNTER,
    "Admitted requests with targets by objective (ttft, itl, all) and result: met or missed.",
    ("slo_class", "objective", "result"),
    values=(("objective", ("ttft", "itl", "all")), ("result", ("met", "missed"))),
)
PREDICTION_RATIO = Series(
    "baton_prediction_ratio",
    Kind.HISTOGRAM,
    "What came, as a share of what was predicted at admission: time to first token from arrival "
    "(ttft), mean time between tokens (itl).",
    ("objective",),
    (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0),
    values=(("objective", ("ttft", "itl")),),
)
UNAUTHORIZED = Series(
    "baton_requests_unauthorized_total",
    Kind.COUNTER,
    "Requests without a valid API key: missing, malformed or unknown.",
    ("reason",),
    values=(("reason", ("missing", "malformed", "unknown")),),
)
REFUSED_HANDSHAKES = Series(
    "baton_router_handshakes_refused_total",
    Kind.COUNTER,
    "TLS handshakes at the front doors that failed, by reason; no_call: connections to the gRPC "
    "door that never made a call.",
    ("reason",),
    values=(
        (
            "reason",
            ("expired", "foreign", "missing", "plain_text", "by_client", "other", "no_call"),
        ),
    ),
)
SHARED_UP = Series(
    "baton_router_shared_state_up",
    Kind.GAUGE,
    "1 while the store that router copies share answers; 0: quotas are estimated.",
    ("backend",),
)
ROUTER_COPIES = Series(
    "baton_router_copies", Kind.GAUGE, "Live routers of this deployment, this one included."
)
SHARED_GARBAGE = Series(
    "baton_router_shared_garbage_total",
    Kind.COUNTER,
    "Values refused in the shared store: key, quota, copies, placement or registration.",
    ("kind",),
    values=(("kind", ("key", "quota", "copies", "placement", "registration")),),
)
QUOTA_ANSWERS = Series(
    "baton_router_quota_answers_total",
    Kind.COUNTER,
    "Questions to tenants' quotas: granted or refused, exact or estimated.",
    ("answer", "source"),
    values=(("answer", ("granted", "refused")), ("source", ("exact", "estimated"))),
)
SHARED_NOTES = Series(
    "baton_router_placement_notes_total",
    Kind.COUNTER,
    "Placements told between router copies: sent, received, or dropped.",
    ("direction",),
    values=(("direction", ("sent", "received", "dropped")),),
)

ALL_SERIES: tuple[Series, ...] = tuple(v for v in list(globals().values()) if isinstance(v, Series))
