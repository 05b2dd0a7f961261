"""Quotas as one copy estimates them while the store is away.

While the store answers, its levels are noted here, divided by the number of copies. When it does
not, this copy grants from its share by itself and keeps account, to charge the store when it is
back: what a bucket would have refilled meanwhile is forgiven.

Pure: time is passed in. Bounded by `MAX_TENANTS`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass, field

from services.router.shared.ledger import SLOT_RETRY_S, Bucket, LedgerAnswer, TenantLedger
from services.router.shared.state import QuotaKind, QuotaLimits
from services.router.shared.store import Refund, Take

MAX_TENANTS = 10_000


def share_of(limits: QuotaLimits, num_copies: int) -> QuotaLimits:
    """One copy's part of `limits`; at least one of each, or small limits would stop all work."""

    def part(kind: QuotaKind) -> int | None:
        limit = limits.limit(kind)
        return None if limit is None else max(1, limit // max(1, num_copies))

    return QuotaLimits(
        part(QuotaKind.REQUESTS), part(QuotaKind.TOKENS), part(QuotaKind.CONCURRENCY)
    )


@dataclass(slots=True)
class _TenantView:
    limits: QuotaLimits
    ledger: TenantLedger = field(default_factory=TenantLedger)
    spent: TenantLedger = field(default_factory=TenantLedger)
    """Full when this copy has granted nothing by itself lately."""
    is_charged: bool = False


class LocalView:
    """The last view of every tenant's quota."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, _TenantView] = OrderedDict()

    def saw(self, take: Take, answer: LedgerAnswer, num_copies: int, now_s: float) -> None:
        """The store answered: its levels are the view from now on."""
        view = self._view(take.tenant, take.limits)
        share = share_of(take.limits, num_copies)
        view.ledger.requests = _bucket(
            share.requests_per_minute, answer.request_level, num_copies, now_s
        )
        view.ledger.tokens = _bucket(share.tokens_per_minute, answer.token_level, num_copies, now_s)

    def estimate(self, take: Take, *, num_copies: int, num_held: int, now_s: float) -> LedgerAnswer:
        """Grant from this copy's share. `num_held`: slots of the tenant's requests here."""
        view = self._view(take.tenant, take.limits)
        share = share_of(take.limits, num_copies)
        if share.max_concurrent is not None and num_held >= share.max_concurrent:
            return LedgerAnswer(False, SLOT_RETRY_S, QuotaKind.CONCURRENCY)
        answer = view.ledger.take(
            # Slots held here are the caller's to count.
            dataclasses.replace(share, max_concurrent=None),
            num_requests=take.num_requests,
            num_tokens=take.num_tokens,
            slot=take.slot,
            slot_ttl_s=take.slot_ttl_s,
            now_s=now_s,
        )
        if answer.is_granted:
            view.spent.settle(share, now_s)
            view.spent.charge(take.num_requests, take.num_tokens)
            view.is_charged = True
        return answer

    def refund(self, refund: Refund, *, num_copies: int, now_s: float) -> None:
        """Of a request that was granted by `estimate`, before the store was charged for it."""
        view = self._tenants.get(refund.tenant)
        if view is None:
            return
        share = share_of(refund.limits, num_copies)
        for ledger in (view.ledger, view.spent):
            ledger.settle(share, now_s)
            ledger.charge(-refund.num_requests, -refund.num_tokens)

    def charges(self, *, num_copies: int, now_s: float) -> list[Refund]:
        """What to charge the store with, now that it is back. The account starts anew."""
        found = []
        for tenant, view in self._tenants.items():
            if not view.is_charged:
                continue
            view.spent.settle(share_of(view.limits, num_copies), now_s)
            num_requests, num_tokens = _missing(view.spent.requests), _missing(view.spent.tokens)
            if num_requests or num_tokens:
                found.append(
                    Refund(tenant, view.limits, num_requests=-num_requests, num_tokens=-num_tokens)
                )
            view.spent = TenantLedger()
            view.is_charged = False
        return found

    def _view(self, tenant: str, limits: QuotaLimits) -> _TenantView:
        view = self._tenants.get(tenant)
        if view is None:
            if len(self._tenants) >= MAX_TENANTS:
                self._tenants.popitem(last=False)
            view = self._tenants[tenant] = _TenantView(limits)
        view.limits = limits
        self._tenants.move_to_end(tenant)
        return view


def _bucket(
    capacity: int | None, level: float | None, num_copies: int, now_s: float
) -> Bucket | None:
    if capacity is None or level is None:
        return None
    return Bucket(capacity, min(capacity, level / max(1, num_copies)), now_s)


def _missing(bucket: Bucket | None) -> int:
    return 0 if bucket is None else max(0, round(bucket.capacity - bucket.level))
