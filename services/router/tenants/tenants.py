"""Who sends a request, and what it asks of the platform beside an answer.

    Authorization: Bearer KEY     the tenant, where keys are required
    X-Tenant-Id                   the tenant, where a gateway is trusted to say so
    X-SLO-Class                   class of service
    X-SLO-TTFT-Ms, X-SLO-ITL-Ms   targets of its own
    X-Priority                    among requests of its tenant; smaller goes first
    X-Session-Id                  the conversation

HTTP headers and gRPC metadata alike.

Does not know: bodies, queues, where the shared store is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton.core import metrics as series
from baton.core.clock import MonotonicClock
from baton.core.errors import InvalidRequest, NotAuthorized
from baton.telemetry.metrics import Metrics
from services.router.admission.slo import SloTargets, class_named, class_targets, target_from_ms
from services.router.admission.slo_config import MAX_PRIORITY, SloConfig
from services.router.requests.generation import NO_LIMITS
from services.router.shared.process_state import ProcessState
from services.router.shared.state import MAX_TENANT_CHARS, QuotaLimits, TenantRecord, hash_key
from services.router.tenants.api_keys import MAX_KEY_CHARS, KeyFile
from services.router.tenants.tenants_config import TenantConfig, TenantsConfig

HeaderOf = Callable[[str], str]
"""The value of a header named in lower case, empty when it is missing."""

ANONYMOUS = "anonymous"
MAX_SESSION_CHARS = 256
"""Of a conversation's key, tenant included; affinity ignores longer ones."""
_BEARER = re.compile(r"bearer +([\x21-\x7e]+) *", re.IGNORECASE)


class KeyOwners(Protocol):
    """Where keys are looked up, beside a file: `SharedState`."""

    async def key_owner(self, key_hash: str) -> TenantRecord | None: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Of one request. As `GenerationInput` has it."""

    tenant: str = ""
    weight: float = 1.0
    limits: QuotaLimits = NO_LIMITS
    priority: int = 0
    slo_class: str = ""
    targets: SloTargets | None = None
    session: str = ""
    isolates_cache: bool = False

    def cache_salt(self, asked: str) -> str:
        """Root of the request's block hashes. `asked`: the client's own, if any, which only parts
        the tenant's cache further: names hold no NUL, so no salt reaches into another's."""
        return f"{self.tenant}\0{asked}" if self.isolates_cache else asked

    def session_key(self, user: str) -> str:
        """`user`: the body's; X-Session-Id goes before it. Conversations of two tenants differ."""
        name = self.session or user
        if len(self.tenant) + 1 + len(name) > MAX_SESSION_CHARS:
            name = hashlib.sha256(name.encode(errors="replace")).hexdigest()
        return f"{self.tenant}\0{name}" if name else ""


class Tenants:
    """One per router process."""

    def __init__(
        self,
        config: TenantsConfig,
        slo: SloConfig,
        *,
        key_file: KeyFile | None,
        shared: KeyOwners,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._slo = slo
        self._key_file = key_file
        self._shared = shared
        self._metrics = metrics

    async def caller(self, header: HeaderOf) -> Caller:
        """Raises NotAuthorized, InvalidRequest, Unavailable."""
        record = await self._record(header)
        name = record.slo_class if record.slo_class in self._slo.classes else ""
        slo_class = class_named(
            self._slo, header("x-slo-class").strip().lower() or name, param="X-SLO-Class"
        )
        return Caller(
            tenant=record.tenant,
            weight=record.weight,
            limits=record.limits,
            priority=self._priority(header, record, slo_class),
            slo_class=slo_class,
            targets=self._targets(header, slo_class),
            session=header("x-session-id"),
            isolates_cache=self._config.isolates_caches,
        )

    async def _record(self, header: HeaderOf) -> TenantRecord:
        if self._config.needs_key:
            return self._with_settings(await self._key_owner(header("authorization")))
        name = header("x-tenant-id").strip() if self._config.trust_tenant_header else ""
        if len(name) > MAX_TENANT_CHARS or not name.isprintable():
            raise InvalidRequest(
                f"X-Tenant-Id must have at most {MAX_TENANT_CHARS} printable characters",
                param="X-Tenant-Id",
            )
        name = name or ANONYMOUS
        return self._settings(name).record(name)

    async def _key_owner(self, authorization: str) -> TenantRecord:
        if not authorization:
            raise self._refusal(
                "missing", "no API key was sent; set the header Authorization: Bearer KEY"
            )
        match = _BEARER.fullmatch(authorization)
        if match is None or len(match[1]) > MAX_KEY_CHARS:
            raise self._refusal(
                "malformed", "the header Authorization must be of the form Bearer KEY"
            )
        key_hash = hash_key(match[1])
        record = None if self._key_file is None else await self._key_file.owner(key_hash)
        if record is None and self._config.require_key:
            record = await self._shared.key_owner(key_hash)
        if record is None:
            raise self._refusal("unknown", "the API key is not valid here")
        return record

    def _refusal(self, reason: str, message: str) -> NotAuthorized:
        self._metrics.add(series.UNAUTHORIZED, 1, reason)
        return NotAuthorized(message)

    def _settings(self, tenant: str) -> TenantConfig:
        return self._config.named.get(tenant, self._config.default)

    def _with_settings(self, record: TenantRecord) -> TenantRecord:
        """The settings' word counts where the key says nothing."""
        settings = self._settings(record.tenant).record(record.tenant)
        return TenantRecord(
            record.tenant,
            settings.limits if record.limits.is_unlimited else record.limits,
            settings.weight if record.weight == 1.0 else record.weight,
            record.priority or settings.priority,
            record.slo_class or settings.slo_class,
        )

    def _priority(self, header: HeaderOf, record: TenantRecord, slo_class: str) -> int:
        text = header("x-priority").strip()
        if not text:
            return record.priority or self._slo.classes[slo_class].priority
        try:
            return check_priority(int(text), param="X-Priority")
        except ValueError:
            raise InvalidRequest(
                f"X-Priority must be an integer, got {text[:40]!r}", param="X-Priority"
            ) from None

    def _targets(self, header: HeaderOf, slo_class: str) -> SloTargets | None:
        """None: those of the class."""
        texts = header("x-slo-ttft-ms"), header("x-slo-itl-ms")
        if not any(texts) or not self._slo.allow_request_targets:
            return None
        own = SloTargets(
            target_from_ms(texts[0], param="X-SLO-TTFT-Ms"),
            target_from_ms(texts[1], param="X-SLO-ITL-Ms"),
        )
        of_class = class_targets(self._slo, slo_class)
        return SloTargets(own.ttft_s or of_class.ttft_s, own.itl_s or of_class.itl_s)


def open_tenants(
    config: TenantsConfig, slo: SloConfig, *, shared: KeyOwners, metrics: Metrics
) -> Tenants:
    """Raises ConfigError when the key file is missing or broken."""
    key_file = None
    if config.keys_file is not None:
        key_file = KeyFile(config.keys_file, clock=MonotonicClock())
    return Tenants(config, slo, key_file=key_file, shared=shared, metrics=metrics)


def open_to_all(metrics: Metrics) -> Tenants:
    """Everybody is the anonymous tenant."""
    return open_tenants(TenantsConfig(), SloConfig(), shared=ProcessState(), metrics=metrics)


def check_priority(priority: int, *, param: str) -> int:
    """Raises InvalidRequest."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"{param} must be between -{MAX_PRIORITY} and {MAX_PRIORITY} (smaller goes first), "
            f"got {str(priority)[:40]}",
            param=param,
        )
    return priority
