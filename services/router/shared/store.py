"""The seam between `RemoteState` and the places that can hold shared state.

A store does as it is told and raises `Unavailable` when it cannot; patience, estimates and healing
are the caller's. Values that a store finds damaged are never passed on: it reports them to its
`on_garbage` and goes on with what remains, or raises `GarbageValue` where nothing does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.errors import Unavailable
from services.router.shared.ledger import LedgerAnswer
from services.router.shared.state import QuotaLimits, TenantRecord

OnGarbage = Callable[[str, str], None]
"""(kind, reason): kind is one of GARBAGE_KINDS."""
GARBAGE_KINDS = ("key", "quota", "copies", "placement", "registration")


class GarbageValue(Unavailable):
    """What lies in the store cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Take:
    """One request at the door."""

    tenant: str
    limits: QuotaLimits
    num_requests: int
    num_tokens: int
    slot: str
    slot_ttl_s: float


@dataclass(frozen=True, slots=True)
class Refund:
    """One request at its end; negative numbers charge what a copy granted by itself."""

    tenant: str
    limits: QuotaLimits
    num_requests: int = 0
    num_tokens: int = 0
    slot: str = ""
    only_if_held: bool = False


@dataclass(frozen=True, slots=True)
class HeldSlot:
    tenant: str
    slot: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A copy's sign of life."""

    copy_id: str
    copy_ttl_s: float
    slots: Sequence[HeldSlot]
    """Of its running requests; their leases start anew."""
    slot_ttl_s: float


class Store(Protocol):
    """Every call ends within a second, by itself or by Unavailable."""

    async def take(self, take: Take) -> LedgerAnswer: ...

    async def refund(self, refunds: Sequence[Refund]) -> None: ...

    async def beat(self, beat: Beat) -> int:
        """The number of live copies, the caller included."""
        ...

    async def leave(self, copy_id: str) -> None:
        """The copy stops; its slots have been refunded."""
        ...

    async def read_key(self, key_hash: str) -> TenantRecord | None:
        """Raises GarbageValue as well."""
        ...

    async def write_key(self, key_hash: str, record: TenantRecord) -> None: ...

    async def delete_key(self, key_hash: str) -> bool: ...

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        """Without those that cannot be read."""
        ...

    async def publish(self, batch: bytes) -> None:
        """Hand an encoded batch of placements to all copies that listen."""
        ...

    def batches(self) -> AsyncIterator[bytes]:
        """The batches of all copies, the caller's own among them, from now on, until the store
        fails (Unavailable) or the caller stops."""
        ...

    async def close(self) -> None: ...
