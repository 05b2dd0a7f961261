"""What one tenant has used: two rate buckets and the slots of its running requests.

Pure: time is passed in; a step back fills nothing. The same arithmetic runs inside Redis
(`redis_scripts`), so both give the same answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.router.shared.state import QuotaAnswer, QuotaGrant, QuotaKind, QuotaLimits

MINUTE_S = 60.0
SLOT_RETRY_S = 1.0
"""When all slots are taken: nobody knows when a request ends, and asking is cheap."""
EPSILON = 1e-6
"""Rounding of many small refills must not refuse what is there."""


@dataclass(frozen=True, slots=True)
class LedgerAnswer:
    """Levels are what is left after this call, in requests and tokens; None without a limit."""

    is_granted: bool
    retry_after_s: float = 0.0
    exceeded: QuotaKind | None = None
    request_level: float | None = None
    token_level: float | None = None

    def for_request(self, grant: QuotaGrant, *, is_estimated: bool) -> QuotaAnswer:
        """As the door gets it; `grant` is what is granted if it is."""
        return QuotaAnswer(
            grant if self.is_granted else None,
            self.retry_after_s,
            is_estimated,
            self.exceeded,
            _remaining(self.request_level),
            _remaining(self.token_level),
        )


@dataclass(slots=True)
class Bucket:
    """Holds `capacity`, which is one minute's worth, and fills evenly. A level below zero is debt:
    something larger than the capacity was granted, or granted elsewhere meanwhile."""

    capacity: float
    level: float
    at_s: float

    @classmethod
    def full(cls, capacity: float, now_s: float) -> Bucket:
        return cls(capacity, capacity, now_s)

    def settle(self, capacity: float, now_s: float) -> None:
        """Fill up to now; a limit may have changed since."""
        elapsed_s = max(0.0, now_s - self.at_s)
        self.at_s = now_s
        self.capacity = capacity
        self.level = min(capacity, self.level + capacity * elapsed_s / MINUTE_S)

    def wait_s(self, amount: float) -> float:
        """Until `amount` can be taken; 0 when it can be now."""
        missing = min(amount, self.capacity) - self.level
        return 0.0 if missing <= EPSILON else missing * MINUTE_S / self.capacity

    def add(self, amount: float) -> None:
        self.level = min(self.capacity, self.level + amount)


@dataclass(slots=True)
class TenantLedger:
    """One tenant's use. The limits come with each call, since they belong to the key."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    slots: dict[str, float] = field(default_factory=dict)
    """Slot -> when its lease ends."""

    def take(
        self,
        limits: QuotaLimits,
        *,
        num_requests: int,
        num_tokens: int,
        slot: str,
        slot_ttl_s: float,
        now_s: float,
    ) -> LedgerAnswer:
        """All limits together or none."""
        self.settle(limits, now_s)
        waits = {
            QuotaKind.CONCURRENCY: self._slot_wait_s(limits),
            QuotaKind.REQUESTS: self.requests.wait_s(num_requests) if self.requests else 0.0,
            QuotaKind.TOKENS: self.tokens.wait_s(num_tokens) if self.tokens else 0.0,
        }
        exceeded = max(waits, key=lambda kind: waits[kind])
        if waits[exceeded] > 0:
            return self._answer(False, waits[exceeded], exceeded)
        self.charge(num_requests, num_tokens)
        if limits.max_concurrent is not None:
            self.slots[slot] = now_s + slot_ttl_s
        return self._answer(True)

    def give_back(
        self,
        limits: QuotaLimits,
        *,
        num_requests: int,
        num_tokens: int,
        slot: str,
        only_if_held: bool,
        now_s: float,
    ) -> None:
        """Free `slot` and refill; negative amounts charge what was granted elsewhere.

        `only_if_held`: refill only if the slot was there, that is if the take had arrived.
        """
        self.settle(limits, now_s)
        was_held = self.slots.pop(slot, None) is not None
        if was_held or not only_if_held:
            self.charge(-num_requests, -num_tokens)

    def charge(self, num_requests: float, num_tokens: float) -> None:
        if self.requests is not None:
            self.requests.add(-num_requests)
        if self.tokens is not None:
            self.tokens.add(-num_tokens)

    def settle(self, limits: QuotaLimits, now_s: float) -> None:
        """Fill the buckets, drop leases that have ended."""
        self.requests = _settled(self.requests, limits.requests_per_minute, now_s)
        self.tokens = _settled(self.tokens, limits.tokens_per_minute, now_s)
        for slot in [s for s, ends_at_s in self.slots.items() if ends_at_s <= now_s]:
            del self.slots[slot]

    def is_idle(self, now_s: float) -> bool:
        """Nothing is left to remember: a new ledger would answer alike."""
        if any(ends_at_s > now_s for ends_at_s in self.slots.values()):
            return False
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                filled = bucket.capacity * (now_s - bucket.at_s) / MINUTE_S
                if bucket.level + filled < bucket.capacity:
                    return False
        return True

    def _slot_wait_s(self, limits: QuotaLimits) -> float:
        limit = limits.max_concurrent
        return SLOT_RETRY_S if limit is not None and len(self.slots) >= limit else 0.0

    def _answer(
        self, is_granted: bool, retry_after_s: float = 0.0, exceeded: QuotaKind | None = None
    ) -> LedgerAnswer:
        return LedgerAnswer(
            is_granted,
            retry_after_s,
            exceeded,
            self.requests.level if self.requests else None,
            self.tokens.level if self.tokens else None,
        )


def _remaining(level: float | None) -> int | None:
    return None if level is None else max(0, int(level + EPSILON))


def _settled(bucket: Bucket | None, limit: int | None, now_s: float) -> Bucket | None:
    if limit is None:
        return None
    if bucket is None:
        return Bucket.full(limit, now_s)
    bucket.settle(limit, now_s)
    return bucket
