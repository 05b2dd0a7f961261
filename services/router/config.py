"""Settings of one router process.

Layers, lowest first: field defaults, a YAML file, the environment (`BATON_<SECTION>__<FIELD>`),
explicit overrides. This file knows nothing of command lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError
from baton.core.tls import TlsConfig
from baton.core.worker_info import Role
from baton.settings import LogConfig, check_positive, load
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo_config import SloConfig
from services.router.copy_config import CopyConfig
from services.router.edge.edge_config import EdgeConfig
from services.router.index.prefix_table import MAX_ENTRIES
from services.router.placement.perf_config import PerfConfig
from services.router.placement.policy_config import PolicyConfig
from services.router.pool_stats_config import PoolStatsConfig
from services.router.requests.retry_config import BreakerConfig, RetryConfig
from services.router.shared.config import SharedConfig, SharedPlace
from services.router.telemetry_config import MetricsConfig, TracingConfig
from services.router.tenants.tenants_config import TenantsConfig
from services.router.ui.ui_config import UiConfig


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """The stream to each worker."""

    connect_timeout_s: float = 3.0
    """Until the connection to a worker stands."""
    welcome_timeout_s: float = 65.0
    """From then to the worker's Welcome, which waits for the engine step at work; above the longest
    one. A process that has stopped is found by the connection's keep-alives long before."""
    idle_timeout_s: float = 3.0
    """A session without any message for this long is broken off. Workers repeat their load every
    second, so this is three missed reports; a stopped process is found this way."""
    backoff_min_s: float = 0.1
    """First pause before connecting again; doubles with every failure."""
    backoff_max_s: float = 2.0
    stall_quarantine_s: float = 10.0
    """Pause after a worker held requests without any progress, although it answered."""
    resync_timeout_s: float = 65.0
    """After a gap in KV events a new snapshot, which waits for the engine as well, must come within
    this time, or the session is reopened. Until then the worker is placed by load alone."""
    max_snapshot_blocks: int = 1_000_000
    """A worker that says it holds more blocks than this is placed by load alone, and the log says
    so: its snapshot would push out what is known of all others."""
    max_pending_deltas: int = 64
    """Deltas waiting for a slow client before they are merged into one."""

    def __post_init__(self) -> None:
        check_positive(
            "session", self, "connect_timeout_s", "welcome_timeout_s", "idle_timeout_s",
            "backoff_min_s", "backoff_max_s", "stall_quarantine_s", "resync_timeout_s",
            "max_pending_deltas", "max_snapshot_blocks",
        )  # fmt: skip
        if self.backoff_min_s > self.backoff_max_s:
            raise ConfigError(
                "session.backoff_min_s must not be above backoff_max_s, "
                f"got {self.backoff_min_s:g} and {self.backoff_max_s:g}"
            )


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """What a request may cost the platform before it is an error."""

    max_retries: int = 3
    """Placements after the first one."""
    worker_wait_s: float = 10.0
    """How long a request waits for a worker to come (back)."""
    stall_s: float = 30.0
    """A worker that has a request to work on and makes no progress at all for this long is taken
    as lost. Must exceed its longest engine step."""
    request_stall_s: float = 180.0
    """A request without a token for this long is moved although its worker progresses."""
    slow_client_s: float = 30.0
    """A client that takes nothing for this long, while tokens are there for it, loses its request:
    the worker's blocks are worth more to others."""
    watchdog_period_s: float = 0.25

    def __post_init__(self) -> None:
        check_positive(
            "dispatch", self, "worker_wait_s", "stall_s", "request_stall_s", "slow_client_s",
            "watchdog_period_s",
        )  # fmt: skip
        if self.max_retries < 0:
            raise ConfigError(f"dispatch.max_retries must not be negative, got {self.max_retries}")


@dataclass(frozen=True, slots=True)
class MigrationConfig:
    """Moving running requests from one worker to another."""

    enabled: bool = True
    low_watermark: float = 0.05
    """A decode worker with less than this share of its blocks available (free, or cached and
    evictable) is under pressure: requests move away before it has to preempt."""
    high_watermark: float = 0.15
    """They move until this share is available again, and only to workers that keep it."""
    max_concurrent: int = 4
    """Requests on their way from one worker, and likewise to one worker, at a time. Each holds a
    lease and reads over the link that other requests need too."""
    min_remaining_tokens: int = 64
    """Under pressure, requests with fewer tokens left stay: they free their blocks by ending about
    as soon as by moving. A worker that drains loses them all the same."""
    min_stay_s: float = 10.0
    """A request that has moved is not moved again for this long, unless its worker drains."""
    takeover_timeout_s: float = 20.0
    """Until the new worker must have produced a token; then it is told to give up, and the old one
    goes on."""
    cooldown_s: float = 1.0
    """After a failed move, neither the request nor the worker it was to go to is tried for this
    long; doubles with every failure in a row."""
    cooldown_max_s: float = 30.0
    period_s: float = 0.25
    """How often loads are looked at."""

    def __post_init__(self) -> None:
        check_positive(
            "migration", self, "max_concurrent", "min_stay_s", "takeover_timeout_s", "cooldown_s",
            "cooldown_max_s", "period_s",
        )  # fmt: skip
        if not 0 <= self.low_watermark < self.high_watermark <= 1:
            raise ConfigError(
                "migration.low_watermark and high_watermark must be shares of the blocks, the low "
                f"one below the high one, got {self.low_watermark:g} and {self.high_watermark:g}"
            )
        if self.min_remaining_tokens < 0:
            raise ConfigError(
                "migration.min_remaining_tokens must not be negative, "
                f"got {self.min_remaining_tokens}"
            )


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """The prefix index."""

    max_entries: int = 1_000_000
    """Distinct blocks remembered, 31 bytes each with up to 64 workers and 20 more for every 64
    beyond; the memory is taken at the start. Best above what all workers can hold together: the
    least recently used ones go beyond it."""
    max_pending: int = 1024
    """KV changes gathered before they are applied at once; after some milliseconds they are
    applied in any case. 0 applies all before every match: exact, and slower under load."""
    predicted_ttl_s: float = 5.0
    """How long a worker is taken to hold the prompts it was just sent, until its KV events say so.
    About the time from a placement to the end of its prefill."""

    def __post_init__(self) -> None:
        check_positive("index", self, "max_entries", "predicted_ttl_s")
        if self.max_entries > MAX_ENTRIES:
            raise ConfigError(
                f"index.max_entries must be at most {MAX_ENTRIES}, got {self.max_entries}"
            )
        if self.max_pending < 0:
            raise ConfigError(f"index.max_pending must not be negative, got {self.max_pending}")


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """When the router calls itself ready."""

    token_fresh_s: float = 10.0
    """With work at hand, a token or other progress must be at most this old."""
    load_fresh_s: float = 3.0
    """Without work, workers must have reported within this time."""
    required_roles: tuple[Role, ...] = (Role.PREFILL, Role.DECODE)
    """Pools that must answer."""

    def __post_init__(self) -> None:
        check_positive("health", self, "token_fresh_s", "load_fresh_s")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """One router process."""

    model_path: Path
    """Hugging Face folder with the tokenizer of the model the workers serve."""
    model_name: str | None = None
    """The name clients use and workers announce; None takes the model folder's name."""
    host: str = "127.0.0.1"
    """Address of the front doors."""
    http_port: int = 8000
    """0 takes any free port."""
    grpc_port: int = 9000
    """0 takes any free port."""
    registry_dir: Path | None = None
    """Directory of the single-machine worker registry."""
    workers: tuple[str, ...] = ()
    """Addresses (host:port) of workers, instead of a registry."""
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    perf: PerfConfig = field(default_factory=PerfConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    tenants: TenantsConfig = field(default_factory=TenantsConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    shared: SharedConfig = field(default_factory=SharedConfig)
    """What the copies of a router know together."""
    copy: CopyConfig = field(default_factory=CopyConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    """Towards the workers; the front doors are not affected."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    pool_stats: PoolStatsConfig = field(default_factory=PoolStatsConfig)
    ui: UiConfig = field(default_factory=UiConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            port = getattr(self, name)
            if not 0 <= port <= 65535:
                raise ConfigError(f"{name} must be between 0 and 65535, got {port}")
        if self.registry_dir is not None and self.workers:
            raise ConfigError("registry_dir and workers are both set; workers come from one source")
        tenants = self.tenants
        for name, tenant in (("default", tenants.default), *tenants.named.items()):
            if tenant.slo_class and tenant.slo_class not in self.slo.classes:
                raise ConfigError(
                    f"tenants: the slo_class of {name} is {tenant.slo_class!r}, which is not one "
                    f"of {', '.join(sorted(self.slo.classes))}"
                )
        is_alone = self.shared.found_place is SharedPlace.PROCESS
        if tenants.require_key and tenants.keys_file is None and is_alone:
            raise ConfigError(
                "tenants.require_key is set and there is nowhere to find keys: set shared.url or "
                "tenants.keys_file"
            )

    @property
    def served_model_name(self) -> str:
        return self.model_name or self.model_path.resolve().name


def load_router_config(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RouterConfig:
    """Build the settings from their layers. Raises ConfigError naming the wrong key."""
    return load(RouterConfig, file=file, environ=environ, overrides=overrides)
