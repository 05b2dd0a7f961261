"""Settings of what the router copies share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.core.errors import ConfigError
from baton.registry.redis_connection import check_deployment, check_redis_url
from baton.settings import check_positive


class SharedPlace(Enum):
    """Where shared state is kept."""

    AUTO = "auto"
    """Redis where `url` is set, else in this process."""
    PROCESS = "process"
    REDIS = "redis"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class SharedConfig:
    """Quotas, keys and placements over the copies of a router."""

    place: SharedPlace = SharedPlace.AUTO
    url: str | None = field(default=None, repr=False)
    """redis://[user:password@]host:port/db, rediss:// for TLS, unix:// for a socket. Workers are
    found there too where neither registry_dir nor workers is set."""
    deployment: str = "baton"
    """Copies of one name share; several deployments can use one Redis."""
    num_copies: int = 1
    """Without a store: how many copies there are, each of which grants its share of the quotas."""
    budget_s: float = 0.05
    """What one question to the store may cost a request."""
    copy_ttl_s: float = 8.0
    """A copy that shows no sign of life for this long no longer counts. Copies show one at a
    quarter of it."""
    slot_ttl_s: float = 15.0
    """After this time the concurrency slots of a router that was killed are free again. Running
    requests renew theirs with every sign of life."""
    key_fresh_s: float = 5.0
    """How old an answer about an API key may be: removing a key works within this time."""
    key_stale_s: float = 3600.0
    """How old it may be while the store is away."""
    max_cached_keys: int = 10_000

    def __post_init__(self) -> None:
        check_positive(
            "shared", self, "num_copies", "budget_s", "copy_ttl_s", "slot_ttl_s", "key_fresh_s",
            "key_stale_s", "max_cached_keys",
        )  # fmt: skip
        check_deployment("shared.deployment", self.deployment)
        if self.slot_ttl_s < self.copy_ttl_s:
            raise ConfigError(
                f"shared.slot_ttl_s {self.slot_ttl_s:g} is below copy_ttl_s {self.copy_ttl_s:g}: "
                "slots of live routers would lapse between two signs of life; raise it"
            )
        if self.url is not None:
            check_redis_url("shared.url", self.url)
        if self.place is SharedPlace.REDIS and self.url is None:
            raise ConfigError("shared.place is redis and shared.url is not set")

    @property
    def found_place(self) -> SharedPlace:
        """`place`, with AUTO worked out."""
        if self.place is not SharedPlace.AUTO:
            return self.place
        return SharedPlace.PROCESS if self.url is None else SharedPlace.REDIS
