"""Settings of one worker process, composed with the pool's defaults in `services/*/config.py`.

Layers, lowest first: field defaults, the pool's defaults, a YAML file, the environment
(`BATON_<SECTION>__<FIELD>`), explicit overrides. This file knows nothing of command lines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from baton.core.config import build, merge
from baton.core.errors import ConfigError
from baton.core.tls import TlsConfig
from baton.core.worker_info import Role
from baton.engine.config import Device, EngineConfig
from baton.registry.redis_connection import check_deployment, check_redis_url
from baton.settings import LogConfig, check_positive, merge_layers
from kvtransfer.select import TransportKind
from kvtransfer.tiers.config import TierConfig
from services.worker.pool_limits import POOL_LIMITS

GPU_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        # A block of 64 tokens arrives by one bulk copy; a step of 8,192 tokens keeps the tensor
        # cores busy, and 256 sequences read the weights once for all of them.
        "engine": {"block_size": 64, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
    }
)
"""What a GPU changes in a pool's own defaults."""


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Leases and reads between workers."""

    transport: TransportKind = TransportKind.AUTO
    """auto offers all that work here and reads each peer by the best that reaches it; the log says
    which and why. A name restricts this worker to one, as a reader and as an owner."""
    cluster_secret: str | None = field(default=None, repr=False)
    """Signs peer cards; equal on all workers of a cluster. None shares a file in the registry
    directory, which serves the workers of one machine."""
    lease_s: float = 15.0
    """How long the owner keeps blocks for a reader that does not renew. Readers renew at a third
    of it, so a busy machine may delay a renewal by seconds."""
    connect_timeout_s: float = 5.0
    """Reaching a peer, exchanging cards and timing the link."""
    read_timeout_s: float = 10.0
    """One read. Ample for a whole prompt on a slow link; a dead peer is noticed sooner."""
    link_grace_s: float = 2.0
    """How long a broken stream to a peer may take to come back. As an owner, this worker keeps what
    is leased to a reader whose stream broke 2.5 times as long."""
    enable_prefix_fetch: bool = True
    """Read parts of a prompt from the cache of a peer that a router names, where that is cheaper
    than computing them."""
    max_fetch_share: float = 0.5
    """Of the time that computing would take, how much a request may wait for blocks from a peer or
    a tier. What has not come by then is computed, so a bad guess costs this much at most."""

    def __post_init__(self) -> None:
        check_positive(
            "transfer", self, "lease_s", "connect_timeout_s", "read_timeout_s", "link_grace_s"
        )
        if not 0 < self.max_fetch_share <= 1:
            raise ConfigError(
                f"transfer.max_fetch_share must be above 0 and at most 1, got "
                f"{self.max_fetch_share}; enable_prefix_fetch: false turns fetches off"
            )
        if self.cluster_secret is not None and len(self.cluster_secret) < 16:
            raise ConfigError(
                f"transfer.cluster_secret has {len(self.cluster_secret)} characters; "
                "take at least 16, for example `openssl rand -hex 32`"
            )


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Where the worker announces itself, in both places where both are set. With Ray routers learn
    of it in another way; peers and tools still look here."""

    directory: Path | None = None
    """Private directory shared with the routers of this machine. None: not announced there."""
    directory_is_local: bool = False
    """The directory lists the workers of one container, for its own probes; others, unlisted, are
    peers too. Who is a peer is then heard from routers."""
    url: str | None = field(default=None, repr=False)
    """Redis that routers of any machine watch, as `shared.url` of theirs. None: not announced
    there. Peers of other machines need transfer.cluster_secret as well."""
    deployment: str = "baton"
    """As `shared.deployment` of the routers."""
    ttl_s: float = 5.0
    """A worker that stops renewing is gone after this time."""

    def __post_init__(self) -> None:
        check_positive("registry", self, "ttl_s")
        check_deployment("registry.deployment", self.deployment)
        if self.url is not None:
            check_redis_url("registry.url", self.url)


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Bounds on what the worker keeps for a router that reads slowly."""

    load_period_s: float = 1.0
    """An idle worker repeats its load this often, so that routers see it is alive."""
    max_pending_tokens: int = 1 << 17
    """Generated tokens waiting for one router; beyond it the session is closed."""
    max_pending_hashes: int = 1 << 19
    """KV event hashes (16 bytes each) waiting for one router; beyond it likewise."""

    def __post_init__(self) -> None:
        check_positive("session", self, "load_period_s", "max_pending_tokens", "max_pending_hashes")


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """When a worker stops calling itself healthy."""

    period_s: float = 1.0
    step_timeout_s: float = 60.0
    """A single engine step never takes this long."""
    ping_timeout_s: float = 5.0
    """An idle engine thread answers within this time."""
    max_bad_verdicts: int = 5
    """This many in a row, one a period, and the process ends, to be started anew. The time limits
    above pass before the first of them."""

    def __post_init__(self) -> None:
        check_positive(
            "health", self, "period_s", "step_timeout_s", "ping_timeout_s", "max_bad_verdicts"
        )


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process."""

    engine: EngineConfig
    role: Role
    model_name: str | None = None
    """The name clients use; None takes the model folder's name."""
    worker_id: str | None = None
    """Stable name of this worker; None makes one up from the role and a random part."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 0
    """0 takes any free port."""
    advertise_host: str | None = None
    """Host name or address under which routers and peers reach this worker; None takes `host`."""
    drain_s: float = 20.0
    """How long a stopping worker waits for running requests and leases."""
    transfer: TransferConfig = field(default_factory=TransferConfig)
    tiers: TierConfig = field(default_factory=TierConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    other_engine: EngineConfig | None = None
    """Engine settings of the other pool: their step limits apply once this worker has changed its
    role, and whatever else differs keeps it where it is. None takes `engine` with the other pool's
    own limits."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        if self.drain_s < 0:
            raise ConfigError(f"drain_s must not be negative, got {self.drain_s}")
        rank_timeout_s, step_timeout_s = self.engine.rank_timeout_s, self.health.step_timeout_s
        if self.engine.tp_size > 1 and rank_timeout_s >= step_timeout_s:
            raise ConfigError(
                f"engine.rank_timeout_s {rank_timeout_s:g} is not below health.step_timeout_s "
                f"{step_timeout_s:g}: the worker would end without saying which rank hangs; lower "
                "the first or raise the second"
            )
        if self.host in ("0.0.0.0", "::") and self.advertise_host is None:
            raise ConfigError(
                f"host {self.host} listens everywhere but names no address; set advertise_host"
            )

    @property
    def served_model_name(self) -> str:
        return self.model_name or self.engine.model_path.resolve().name


def load_worker_config(
    *,
    defaults: Mapping[str, Any],
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> WorkerConfig:
    """Build the settings from their layers over the pool's `defaults`, or those of a GPU where the
    layers choose one. Raises ConfigError naming the wrong key.
    """
    settings = merge_layers(WorkerConfig, file=file, environ=environ, overrides=overrides)
    values = merge(defaults_for_device(defaults, settings), settings)
    values.pop("other_engine", None)
    config = build(WorkerConfig, values)
    return dataclasses.replace(config, other_engine=_other_engine(config.role, settings))


def _other_engine(role: Role, settings: Mapping[str, Any]) -> EngineConfig | None:
    """None where nobody has given it and `engine` does not fit the other pool's limits."""
    limits = {"engine": POOL_LIMITS[role.other]}
    given = settings.get("other_engine")
    if given:
        engine = merge(defaults_for_device(limits, {"engine": given}), {"engine": given})["engine"]
        path = merge({"model_path": settings["engine"]["model_path"]}, engine)
        return build(EngineConfig, path, where="other_engine.")
    try:
        own = {"engine": settings["engine"]}
        return build(EngineConfig, merge(defaults_for_device(limits, own), own)["engine"])
    except ConfigError:
        return None


def defaults_for_device(
    defaults: Mapping[str, Any], settings: Mapping[str, Any]
) -> Mapping[str, Any]:
    """A pool's `defaults` for the device that a worker's `settings` choose, both not built yet.

    The choice comes before any check, since a device's settings fit its own defaults alone.
    """
    engine = merge(defaults, settings).get("engine")
    device = engine.get("device") if isinstance(engine, Mapping) else None
    if device in (Device.CUDA, Device.CUDA.value):
        return merge(defaults, GPU_DEFAULTS)
    return defaults
