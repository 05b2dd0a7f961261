"""The quota that running requests of this copy hold.

Pure.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from services.router.shared.state import QuotaGrant
from services.router.shared.store import HeldSlot, Refund


@dataclass(slots=True)
class Held:
    grant: QuotaGrant
    is_estimated: bool
    """Granted from this copy's share, and the store does not know of it yet."""


class HeldGrants:
    """From `add` until `remove`, in the order they came."""

    def __init__(self) -> None:
        self._by_slot: dict[str, Held] = {}
        self._num_by_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_slot)

    def add(self, grant: QuotaGrant, *, is_estimated: bool) -> None:
        self._by_slot[grant.slot] = Held(grant, is_estimated)
        self._num_by_tenant[grant.tenant] += 1

    def remove(self, slot: str) -> Held | None:
        held = self._by_slot.pop(slot, None)
        if held is not None:
            tenant = held.grant.tenant
            self._num_by_tenant[tenant] -= 1
            if not self._num_by_tenant[tenant]:
                del self._num_by_tenant[tenant]
        return held

    def count(self, tenant: str) -> int:
        return self._num_by_tenant.get(tenant, 0)

    def limited_slots(self) -> list[HeldSlot]:
        """Those that count against a limit of concurrent requests."""
        return [
            HeldSlot(held.grant.tenant, slot)
            for slot, held in self._by_slot.items()
            if held.grant.limits.max_concurrent is not None
        ]

    def settle(self) -> None:
        """The store knows of all of them now."""
        for held in self._by_slot.values():
            held.is_estimated = False

    def clear(self) -> list[Refund]:
        """Nothing is held any more; what there was, to be given back with all its tokens spent."""
        refunds = [
            Refund(held.grant.tenant, held.grant.limits, slot=slot)
            for slot, held in self._by_slot.items()
            if held.grant.limits.max_concurrent is not None
        ]
        self._by_slot.clear()
        self._num_by_tenant.clear()
        return refunds
