"""LeaseTable under a manual clock."""

from __future__ import annotations

import random

import pytest

from baton.core.block import BlockId
from baton.core.clock import ManualClock
from baton.core.request import RequestId
from baton.core.worker_info import Epoch
from kvtransfer.lease import MAX_REMEMBERED_VERDICTS, LeaseTable
from kvtransfer.messages import LeaseId

EPOCH = Epoch("e1")


def make_table(lease_s: float = 10.0) -> tuple[LeaseTable, ManualClock]:
    clock = ManualClock(100.0)
    return LeaseTable(clock=clock, epoch=EPOCH, lease_s=lease_s), clock


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(n) for n in numbers]


def test_lease_is_valid_until_it_expires():
    table, clock = make_table()
    lease = table.grant(RequestId("r"), ids(1, 2))
    clock.advance(9.9)
    assert table.complete(lease.lease_id, EPOCH)
    assert len(table) == 0


def test_completion_at_the_expiry_is_too_late_even_before_a_tick():
    table, clock = make_table()
    lease = table.grant(RequestId("r"), ids(1))
    clock.advance(10.0)
    assert not table.complete(lease.lease_id, EPOCH)
    assert [over.request_id for over in table.expire()] == ["r"]
    assert not table.complete(lease.lease_id, EPOCH)


def test_renewal_gives_a_full_term_and_expired_leases_stay_over():
    table, clock = make_table()
    lease = table.grant(RequestId("r"), ids(1))
    clock.advance(9)
    assert table.renew(lease.lease_id)
    clock.advance(9)
    assert table.expire() == []
    clock.advance(1)
    assert not table.renew(lease.lease_id)
    assert len(table.expire()) == 1


def test_expired_leases_are_counted_and_the_next_expiry_is_known():
    table, clock = make_table()
    assert table.next_expiry_s == float("inf")
    first = table.grant(RequestId("a"), ids(1))
    clock.advance(4)
    table.grant(RequestId("b"), ids(2))
    assert table.next_expiry_s == first.expires_at_s and table.requests == ["a", "b"]
    clock.advance(6)
    table.expire()
    table.revoke(table.grant(RequestId("c"), ids(3)).lease_id)
    assert table.num_expired == 1 and table.requests == ["b"]


def test_extension_adds_blocks_and_renews():
    table, clock = make_table()
    lease = table.grant(RequestId("r"), ids(1))
    clock.advance(9)
    longer = table.extend(lease.lease_id, ids(2, 3))
    assert longer.block_ids == (1, 2, 3)
    assert longer.expires_at_s == clock.now() + 10


def test_repeated_completion_gets_the_same_verdict():
    table, _ = make_table()
    good = table.grant(RequestId("good"), ids(1))
    bad = table.grant(RequestId("bad"), ids(1))
    table.revoke(bad.lease_id)
    for _ in range(2):
        assert table.complete(good.lease_id, EPOCH)
        assert not table.complete(bad.lease_id, EPOCH)


@pytest.mark.parametrize("epoch", ["e0", "", "e1 "])
def test_another_epoch_is_not_ours_and_ends_nothing(epoch):
    table, _ = make_table()
    lease = table.grant(RequestId("r"), ids(1))
    assert not table.complete(lease.lease_id, Epoch(epoch))
    assert table.complete(lease.lease_id, EPOCH)
    assert not table.complete(lease.lease_id, Epoch(epoch))


def test_one_lease_per_request():
    table, _ = make_table()
    table.grant(RequestId("r"), ids(1))
    with pytest.raises(ValueError, match="already has a lease"):
        table.grant(RequestId("r"), ids(2))


def test_lease_ids_are_not_guessable():
    table, _ = make_table()
    seen = {table.grant(RequestId(str(i)), []).lease_id for i in range(100)}
    assert len(seen) == 100
    assert all(len(lease_id) == 16 for lease_id in seen)


def test_random_walk_agrees_with_a_simple_model():
    rng = random.Random(7)
    table, clock = make_table(lease_s=5.0)
    model: dict[LeaseId, float] = {}
    requests: dict[LeaseId, int] = {}
    number = 0
    for _ in range(10_000):
        action = rng.choice(["grant", "extend", "renew", "complete", "revoke", "expire", "wait"])
        lease_id = rng.choice(list(model)) if model else LeaseId("none")
        live = model.get(lease_id, 0.0) > clock.now()
        if action == "grant":
            number += 1
            lease = table.grant(RequestId(str(number)), ids(number))
            model[lease.lease_id] = clock.now() + 5
            requests[lease.lease_id] = number
        elif action == "extend" and live:
            table.extend(lease_id, ids(0))
            model[lease_id] = clock.now() + 5
        elif action == "renew":
            assert table.renew(lease_id) == live
            if live:
                model[lease_id] = clock.now() + 5
        elif action == "complete":
            assert table.complete(lease_id, EPOCH) == live
            if live:
                del model[lease_id]
        elif action == "revoke":
            assert (table.revoke(lease_id) is not None) == (model.pop(lease_id, None) is not None)
        elif action == "expire":
            over = {lease.lease_id for lease in table.expire()}
            assert over == {k for k, at_s in model.items() if at_s <= clock.now()}
            for gone in over:
                del model[gone]
        else:
            clock.advance(rng.random())
        assert len(table) == len(model)
        table.check_integrity()
    clock.advance(10)
    table.expire()
    assert len(table) == 0


def test_remembered_verdicts_are_bounded():
    table, _ = make_table()
    first = table.grant(RequestId("first"), ids(1))
    assert table.complete(first.lease_id, EPOCH)
    for i in range(MAX_REMEMBERED_VERDICTS):
        table.revoke(table.grant(RequestId(str(i)), []).lease_id)
    table.check_integrity()
    assert not table.complete(first.lease_id, EPOCH)
