"""Every Prometheus series of the project, declared once. Data only: no client library here.

`baton.telemetry` turns these into live series. Names carry their unit; label values must come
from small closed sets (roles, worker ids, reasons), never from a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
)  # fmt: skip
ITL_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
RATIO_BUCKETS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
BYTES_BUCKETS = tuple(4**n * 1024 for n in range(12))


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


def _seconds(name: str, help: str, *, buckets: tuple[float, ...] = LATENCY_BUCKETS_S) -> Series:
    return Series(name, Kind.HISTOGRAM, help, ("model",), buckets)


TTFT = _seconds("baton_time_to_first_token_seconds", "Arrival to first token at the router.")
ITL = _seconds(
    "baton_inter_token_latency_seconds",
    "Gap between two successive tokens of one request at the router.",
    buckets=ITL_BUCKETS_S,
)
E2E = _seconds("baton_e2e_request_latency_seconds", "Arrival to last token at the router.")
QUEUE = _seconds("baton_request_queue_seconds", "Waiting for the first prefill chunk.")
PREFILL = _seconds("baton_request_prefill_seconds", "First prefill chunk to first token.")
DECODE = _seconds("baton_request_decode_seconds", "First decode step to last token.")
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
    "Prompts sent with the name of another worker that caches more of them.",
    ("role",),
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
)
REJECTED = Series(
    "baton_requests_rejected_total",
    Kind.COUNTER,
    "Requests refused before any work, by HTTP status.",
    ("status",),
)
SLOW_CLIENTS = Series(
    "baton_router_slow_clients_total",
    Kind.COUNTER,
    "Requests given up because their client did not take what was there for it.",
)
RETRIES_REFUSED = Series(
    "baton_router_retries_refused_total",
    Kind.COUNTER,
    "Requests that failed on a worker and were not placed again: the retry budget was spent.",
)
BREAKER_OPEN = Series(
    "baton_router_breaker_open",
    Kind.GAUGE,
    "1 while the worker gets no new requests because too many of its last ones failed.",
    ("worker",),
)
PLACEMENTS = Series(
    "baton_placements_total",
    Kind.COUNTER,
    "Placement decisions: remote_prefill, local_prefill, prefill_only, replay.",
    ("kind",),
)
INDEX_ENTRIES = Series(
    "baton_router_prefix_entries", Kind.GAUGE, "Distinct KV blocks in the prefix index."
)
KV_UNMATCHED = Series(
    "baton_router_kv_unmatched",
    Kind.GAUGE,
    "1 while the worker's KV events are not used and it is placed by load alone.",
    ("worker",),
)
KV_EVENT_FAULTS = Series(
    "baton_router_kv_event_faults_total",
    Kind.COUNTER,
    "What was wrong with workers' KV events: gap, replayed, malformed, too_large, hashing.",
    ("reason",),
)
SESSION_FAULTS = Series(
    "baton_router_session_faults_total",
    Kind.COUNTER,
    "Sessions ended because of what the worker sent: undecodable, no Welcome, impossible values.",
)
RUNNING = Series("baton_requests_running", Kind.GAUGE, "Requests in the router.", ())
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
    "baton_kv_expired_leases_total", Kind.COUNTER, "Leases whose reader went silent."
)
KV_RECYCLES = _of_worker(
    "baton_kv_recycles_total", Kind.COUNTER, "Times a transport was restarted to end lost reads."
)
KV_REFUSED_PEERS = _of_worker(
    "baton_kv_refused_peers_total", Kind.COUNTER, "Connections refused to other workers."
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
WORKERS = Series("baton_workers", Kind.GAUGE, "Live workers seen by this router.", ("role",))
PREFIX_HIT_TOKENS = Series(
    "baton_prefix_cache_hit_tokens_total",
    Kind.COUNTER,
    "Prompt tokens found in a worker's prefix cache.",
    ("role",),
)
PREFIX_QUERY_TOKENS = Series(
    "baton_prefix_cache_query_tokens_total",
    Kind.COUNTER,
    "Prompt tokens looked up in a worker's prefix cache.",
    ("role",),
)
ADMISSIONS = Series(
    "baton_admissions_total",
    Kind.COUNTER,
    "Requests by what admission did: at_once or waited (admitted), or why they were sent away: "
    "ttft, itl, late, queue_full, pushed_out, no_worker.",
    ("slo_class", "result"),
)
ADMISSION_WAIT = Series(
    "baton_admission_wait_seconds",
    Kind.HISTOGRAM,
    "Waiting in the router of requests that waited and were admitted.",
    ("slo_class",),
    LATENCY_BUCKETS_S,
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
)
PREDICTION_RATIO = Series(
    "baton_prediction_ratio",
    Kind.HISTOGRAM,
    "What came, as a share of what was predicted at admission: time to first token from arrival "
    "(ttft), mean time between tokens (itl).",
    ("objective",),
    (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0),
)
UNAUTHORIZED = Series(
    "baton_requests_unauthorized_total",
    Kind.COUNTER,
    "Requests without a valid API key: missing, malformed or unknown.",
    ("reason",),
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
)
QUOTA_ANSWERS = Series(
    "baton_router_quota_answers_total",
    Kind.COUNTER,
    "Questions to tenants' quotas: granted or refused, exact or estimated.",
    ("answer", "source"),
)
SHARED_NOTES = Series(
    "baton_router_placement_notes_total",
    Kind.COUNTER,
    "Placements told between router copies: sent, received, or dropped.",
    ("direction",),
)

ALL_SERIES: tuple[Series, ...] = tuple(v for v in list(globals().values()) if isinstance(v, Series))
