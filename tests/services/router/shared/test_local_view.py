"""What a copy grants by itself, and what it charges the store with afterwards."""

from __future__ import annotations

import random

import pytest

from services.router.shared.ledger import TenantLedger
from services.router.shared.local_view import MAX_TENANTS, LocalView, share_of
from services.router.shared.state import QuotaKind, QuotaLimits
from services.router.shared.store import Refund, Take

LIMITS = QuotaLimits(requests_per_minute=60, tokens_per_minute=6000, max_concurrent=10)


def take(num_tokens: int = 1, tenant: str = "acme", limits: QuotaLimits = LIMITS) -> Take:
    return Take(tenant, limits, 1, num_tokens, "slot", 15.0)


def grants(view: LocalView, count: int, now_s: float, *, num_copies: int = 2) -> int:
    return sum(
        view.estimate(take(), num_copies=num_copies, num_held=0, now_s=now_s).is_granted
        for _ in range(count)
    )


@pytest.mark.parametrize("num_copies", [0, 1, 2, 7, 1000])
def test_a_share_is_never_nothing(num_copies: int) -> None:
    share = share_of(LIMITS, num_copies)
    for kind in QuotaKind:
        limit = share.limit(kind)
        assert limit == max(1, (LIMITS.limit(kind) or 0) // max(1, num_copies))
    assert share_of(QuotaLimits(), num_copies).is_unlimited


def test_a_tenant_never_seen_gets_a_full_share() -> None:
    assert grants(LocalView(), 100, 0.0) == 30


def test_the_share_of_what_was_left_when_the_store_answered_last() -> None:
    view, store = LocalView(), TenantLedger()
    for _ in range(40):
        answer = store.take(
            LIMITS, num_requests=1, num_tokens=1, slot="s", slot_ttl_s=0.0, now_s=0.0
        )
        view.saw(take(), answer, 2, 0.0)
    assert grants(view, 100, 0.0) == 10


def test_slots_of_running_requests_count_against_the_share() -> None:
    view = LocalView()
    for num_held in range(8):
        answer = view.estimate(take(), num_copies=2, num_held=num_held, now_s=0.0)
        assert answer.is_granted == (num_held < 5)
    assert answer.exceeded is QuotaKind.CONCURRENCY


def test_what_was_granted_here_is_charged_once() -> None:
    view = LocalView()
    assert grants(view, 10, 0.0) == 10
    (charge,) = view.charges(num_copies=2, now_s=0.0)
    assert (charge.num_requests, charge.num_tokens) == (-10, -10)
    assert view.charges(num_copies=2, now_s=0.0) == []


def test_what_would_have_refilled_meanwhile_is_forgiven() -> None:
    view = LocalView()
    assert grants(view, 10, 0.0) == 10
    # The share of 30 a minute fills by half a request a second.
    (charge,) = view.charges(num_copies=2, now_s=10.0)
    assert charge.num_requests == -5
    assert grants(view, 10, 10.0) == 10
    assert view.charges(num_copies=2, now_s=1000.0) == []


def test_unused_tokens_of_a_local_grant_are_not_charged() -> None:
    view = LocalView()
    assert view.estimate(take(1000), num_copies=2, num_held=0, now_s=0.0).is_granted
    view.refund(Refund("acme", LIMITS, num_tokens=900), num_copies=2, now_s=0.0)
    (charge,) = view.charges(num_copies=2, now_s=0.0)
    assert charge.num_tokens == -100


def test_tenants_are_bounded() -> None:
    view = LocalView()
    for i in range(MAX_TENANTS + 50):
        view.estimate(take(tenant=f"t{i}"), num_copies=2, num_held=0, now_s=0.0)
    assert len(view.charges(num_copies=2, now_s=0.0)) == MAX_TENANTS
    view.refund(Refund("t0", LIMITS, num_tokens=5), num_copies=2, now_s=0.0)


def test_random_walk_never_grants_more_than_a_share_and_its_refill() -> None:
    rng = random.Random(3)
    view = LocalView()
    now_s, granted = 0.0, 0
    for _ in range(20_000):
        now_s += rng.choice([0.0, 0.01, 0.5, 3.0])
        wanted = take(rng.randrange(50))
        answer = view.estimate(wanted, num_copies=3, num_held=rng.randrange(3), now_s=now_s)
        granted += answer.is_granted
        assert granted <= 20 + now_s * 20 / 60 + 1e-6
        assert answer.is_granted or answer.retry_after_s > 0
        if rng.random() < 0.05:
            assert all(c.num_requests <= 0 for c in view.charges(num_copies=3, now_s=now_s))
