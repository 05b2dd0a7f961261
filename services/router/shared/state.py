"""The seam between a router and what all its copies share.

Behind it is Redis, a Ray actor or, for a single copy, this process. A request takes its quota at
the door and gives back what it did not use at its end; keys say who a client is; placements tell
the siblings where prompts just went.

    answer = await shared.take_quota(tenant, num_tokens=n, limits=record.limits)
    if not answer.is_granted: 429 with answer.retry_after_s
    try: ... serve ...
    finally: shared.return_quota(answer.grant, num_unused_tokens=n - used)

Where the shared store does not answer within its budget, the answer comes from this copy's last
view and says so (`is_estimated`): a copy then grants limit / number of copies by itself.

Does not know: HTTP, queues, placement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from baton.core.errors import ConfigError
from baton.core.worker_info import WorkerId

MAX_TENANT_CHARS = 128


class QuotaKind(Enum):
    """Which limit a request met."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENCY = "max_concurrent"


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """What one tenant may use over all router copies together; None is no limit.

    The two rates are buckets that hold one minute's worth and fill evenly. A request that needs
    more tokens than the bucket holds is granted on a full bucket and leaves a debt, so the mean
    rate holds and no size is refused for ever.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        for kind in QuotaKind:
            value = self.limit(kind)
            if value is not None and not 1 <= value <= 10**12:
                raise ConfigError(
                    f"{kind.value} must be between 1 and 10**12, got {value}; leave it out for no "
                    "limit"
                )

    @property
    def is_unlimited(self) -> bool:
        return all(self.limit(kind) is None for kind in QuotaKind)

    def limit(self, kind: QuotaKind) -> int | None:
        match kind:
            case QuotaKind.REQUESTS:
                return self.requests_per_minute
            case QuotaKind.TOKENS:
                return self.tokens_per_minute
            case QuotaKind.CONCURRENCY:
                return self.max_concurrent


@dataclass(frozen=True, slots=True)
class QuotaGrant:
    """What a request holds while it runs. Opaque to the caller, who only gives it back."""

    tenant: str
    slot: str
    """Names the concurrency slot; unique over all copies."""
    num_tokens: int
    limits: QuotaLimits


@dataclass(frozen=True, slots=True)
class QuotaAnswer:
    """`grant` is set exactly when the request may run."""

    grant: QuotaGrant | None
    retry_after_s: float = 0.0
    """When refused: the earliest time at which the same request can be granted. For concurrency it
    is a guess, since nobody knows when a request will end."""
    is_estimated: bool = False
    """Answered from this copy's share, as the shared store did not."""
    exceeded: QuotaKind | None = None
    """The limit that refused."""
    remaining_requests: int | None = None
    """What is left of the rate after this answer; None without such a limit."""
    remaining_tokens: int | None = None

    @property
    def is_granted(self) -> bool:
        return self.grant is not None


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """To whom an API key belongs and what its holder may do."""

    tenant: str
    limits: QuotaLimits = field(default_factory=QuotaLimits)
    weight: float = 1.0
    """Share of the platform among the tenants that have work waiting."""
    priority: int = 0
    """Of requests that do not say one."""
    slo_class: str = ""
    """Of requests that do not say one; empty takes the default class."""

    def __post_init__(self) -> None:
        check_tenant(self.tenant)
        if not 0 < self.weight <= 1e6:
            raise ConfigError(f"weight must be above 0 and at most 1e6, got {self.weight}")
        if not -100 <= self.priority <= 100:
            raise ConfigError(f"priority must be between -100 and 100, got {self.priority}")
        if len(self.slo_class) > MAX_TENANT_CHARS:
            raise ConfigError(
                f"slo_class has {len(self.slo_class)} characters, {MAX_TENANT_CHARS} at most"
            )


@dataclass(frozen=True, slots=True)
class PlacementNote:
    """Where one prompt just went, for the other copies: until the workers' own events and load
    reports arrive, nobody else could know."""

    hashes: bytes
    """Of the prompt's leading full blocks, 16 bytes each, back to back, first block first."""
    prefill_worker: WorkerId | None
    """Will have computed the prompt; None when the decode worker does."""
    decode_worker: WorkerId | None
    """None for a prompt that is only computed."""
    prefill_tokens: int
    """Prompt tokens the worker that computes has to compute."""
    kv_tokens: int
    """Tokens of KV the decode worker will hold."""


class SharedBackend(Enum):
    PROCESS = "process"
    REDIS = "redis"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class SharedStatus:
    """For /health, the log and the gauges."""

    backend: SharedBackend
    is_up: bool
    """False: answers are estimates from the last view."""
    num_copies: int
    """Live routers, this one included, as last seen; at least 1."""
    since_s: float
    """How long it has been up or down, in seconds."""
    reason: str = ""
    """Why it is down."""


PlacementListener = Callable[[PlacementNote], None]


class SharedState(Protocol):
    """Used on one event loop, from `start` to `stop`.

    No call of the request path waits longer than the budget of `SharedConfig` (50 ms), and none
    but those about keys raises.
    """

    async def start(self) -> None:
        """Join the other copies; returns at once when the store is not there and keeps trying."""
        ...

    async def stop(self) -> None:
        """Leave: gives back what this copy holds. Takes a second at most."""
        ...

    def status(self) -> SharedStatus: ...

    async def take_quota(
        self, tenant: str, *, limits: QuotaLimits, num_tokens: int, num_requests: int = 1
    ) -> QuotaAnswer:
        """Charge `tenant` for one request (of `num_requests` in the sense of its rate) that may
        use up to `num_tokens` tokens, all limits together or none."""
        ...

    def return_quota(
        self,
        grant: QuotaGrant | None,
        *,
        num_unused_tokens: int = 0,
        num_unused_requests: int = 0,
    ) -> None:
        """Free the slot of a request that has ended and take back the tokens it did not use; a
        negative number charges those it used beyond what was taken. `num_unused_requests`: of one
        that never was.

        Never waits, so it can be called in a `finally`; giving back twice or None does nothing.
        """
        ...

    async def key_owner(self, key_hash: str) -> TenantRecord | None:
        """Who holds the key of this `hash_key`; None when there is no such key.

        Raises Unavailable when the store is away and nobody asked for this key lately.
        """
        ...

    async def put_key(self, key_hash: str, record: TenantRecord) -> None:
        """Add or change a key. Raises Unavailable."""
        ...

    async def remove_key(self, key_hash: str) -> bool:
        """Whether there was such a key. Raises Unavailable."""
        ...

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        """All keys by their hash, for tools; those that cannot be read are left out and counted.
        Raises Unavailable."""
        ...

    def publish_placement(self, note: PlacementNote) -> None:
        """Tell the other copies, in batches; dropped and counted when they cannot be told."""
        ...

    def on_placement(self, listener: PlacementListener) -> None:
        """Call `listener` with each note of another copy. At most one listener."""
        ...


def hash_key(key: str) -> str:
    """What is stored of an API key. Keys are random, so a plain hash cannot be searched."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_tenant(tenant: str) -> None:
    """Raises ConfigError on a name that cannot be stored."""
    if not 1 <= len(tenant) <= MAX_TENANT_CHARS or not tenant.isprintable():
        raise ConfigError(
            f"tenant name {tenant[:40]!r} must have 1 to {MAX_TENANT_CHARS} printable characters"
        )
