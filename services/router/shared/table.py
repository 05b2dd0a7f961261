"""Shared state in the memory of one process: that of a single router, or of the Ray actor.

Pure: time is passed in. Bounded by `MAX_TENANTS` and the bounds of `KeyBook`.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.router.shared.key_book import KeyBook
from services.router.shared.ledger import LedgerAnswer, TenantLedger
from services.router.shared.state import TenantRecord
from services.router.shared.store import Beat, Refund, Take

MAX_TENANTS = 100_000
SWEEP_PERIOD_S = 30.0


class SharedTable:
    """Ledgers of tenants, live copies and keys."""

    def __init__(self) -> None:
        self._ledgers: dict[str, TenantLedger] = {}
        self._copies: dict[str, float] = {}
        self.keys = KeyBook()
        self._sweep_at_s = 0.0

    @property
    def num_tenants(self) -> int:
        return len(self._ledgers)

    def take(self, take: Take, now_s: float) -> LedgerAnswer:
        self._sweep(now_s)
        return self._ledger(take.tenant).take(
            take.limits,
            num_requests=take.num_requests,
            num_tokens=take.num_tokens,
            slot=take.slot,
            slot_ttl_s=take.slot_ttl_s,
            now_s=now_s,
        )

    def refund(self, refunds: Sequence[Refund], now_s: float) -> None:
        for refund in refunds:
            self._ledger(refund.tenant).give_back(
                refund.limits,
                num_requests=refund.num_requests,
                num_tokens=refund.num_tokens,
                slot=refund.slot,
                only_if_held=refund.only_if_held,
                now_s=now_s,
            )

    def beat(self, beat: Beat, now_s: float) -> int:
        self._sweep(now_s)
        self._copies[beat.copy_id] = now_s + beat.copy_ttl_s
        for held in beat.slots:
            self._ledger(held.tenant).slots[held.slot] = now_s + beat.slot_ttl_s
        return self.num_copies(now_s)

    def leave(self, copy_id: str, now_s: float) -> int:
        """The copies that remain."""
        self._copies.pop(copy_id, None)
        return self.num_copies(now_s)

    def num_copies(self, now_s: float) -> int:
        self._copies = {c: ends_at_s for c, ends_at_s in self._copies.items() if ends_at_s > now_s}
        return len(self._copies)

    def read_key(self, key_hash: str) -> TenantRecord | None:
        return self.keys.read(key_hash)

    def write_key(self, key_hash: str, record: TenantRecord) -> None:
        """Raises Overloaded."""
        self.keys.write(key_hash, record)

    def delete_key(self, key_hash: str) -> bool:
        return self.keys.revoke(key_hash) is not None

    def list_keys(self) -> dict[str, TenantRecord]:
        return self.keys.live()

    def _ledger(self, tenant: str) -> TenantLedger:
        ledger = self._ledgers.get(tenant)
        if ledger is None:
            if len(self._ledgers) >= MAX_TENANTS:
                # The one that has been here longest; its tenant starts with full buckets again.
                del self._ledgers[next(iter(self._ledgers))]
            ledger = self._ledgers[tenant] = TenantLedger()
        return ledger

    def _sweep(self, now_s: float) -> None:
        if now_s < self._sweep_at_s:
            return
        self._sweep_at_s = now_s + SWEEP_PERIOD_S
        for tenant in [t for t, ledger in self._ledgers.items() if ledger.is_idle(now_s)]:
            del self._ledgers[tenant]
