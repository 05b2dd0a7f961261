"""Settings: who the clients are, and what each of them may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton.core.errors import ConfigError
from services.router.shared.state import QuotaLimits, TenantRecord, check_tenant

MAX_TENANTS = 10_000


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """One tenant. What its API key says goes before what stands here."""

    requests_per_minute: int | None = None
    """None is no limit, as in the following."""
    tokens_per_minute: int | None = None
    """Prompt and output together."""
    max_concurrent: int | None = None
    weight: float = 1.0
    """Share of the platform among tenants that have work waiting."""
    priority: int = 0
    """Of requests that name none; smaller goes first."""
    slo_class: str = ""
    """Of requests that name none; empty takes slo.default_class."""

    def __post_init__(self) -> None:
        self.record("any")

    def record(self, tenant: str) -> TenantRecord:
        """Raises ConfigError on values out of range."""
        limits = QuotaLimits(self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)
        return TenantRecord(tenant, limits, self.weight, self.priority, self.slo_class)


@dataclass(frozen=True, slots=True)
class TenantsConfig:
    """Who may use the platform. Without keys everybody does, as one anonymous tenant."""

    keys_file: Path | None = None
    """API keys as `baton keys --file` writes them; read again when it changes. Every request then
    needs a key."""
    require_key: bool = False
    """Every request needs a key also without a file: keys are in the shared store."""
    trust_tenant_header: bool = False
    """Without keys: X-Tenant-Id names the tenant. Only behind a gateway that sets it itself."""
    isolate_caches: bool | None = None
    """Tenants never share cached prefixes, so that nobody can find out by timing what others
    asked. Common system prompts are then computed once for each tenant. None: as soon as tenants
    are told apart, by keys or by a trusted header."""
    default: TenantConfig = field(default_factory=TenantConfig)
    """Tenants that are not named below, the anonymous one among them."""
    named: Mapping[str, TenantConfig] = field(default_factory=dict)
    """By tenant."""

    def __post_init__(self) -> None:
        if len(self.named) > MAX_TENANTS:
            raise ConfigError(
                f"tenants.named holds at most {MAX_TENANTS} tenants, got {len(self.named)}"
            )
        for name in self.named:
            check_tenant(name)
        if self.trust_tenant_header and self.needs_key:
            raise ConfigError(
                "tenants.trust_tenant_header and API keys are both set; a key says whose it is"
            )

    @property
    def isolates_caches(self) -> bool:
        if self.isolate_caches is None:
            return self.needs_key or self.trust_tenant_header
        return self.isolate_caches

    @property
    def needs_key(self) -> bool:
        return self.require_key or self.keys_file is not None
