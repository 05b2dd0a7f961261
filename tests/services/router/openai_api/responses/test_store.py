"""Stored responses: bounded in number, bytes and time, apart by tenant."""

from __future__ import annotations

import random

import pytest

from baton.core.errors import ConfigError
from services.router.edge.responses_config import ResponsesConfig
from services.router.openai_api.responses.store import ENTRY_BYTES, ResponseStore, Stored


def stored(num_bytes: int = ENTRY_BYTES) -> Stored:
    return Stored(b"x" * (num_bytes - ENTRY_BYTES), None)


def store(**limits) -> ResponseStore:
    return ResponseStore(ResponsesConfig(**limits))


def test_what_was_put_is_there_for_its_tenant_alone():
    kept = store()
    kept.put("a", "r", Stored(b"{}", b"[]"), 0.0)
    assert kept.get("a", "r", 1.0) == Stored(b"{}", b"[]")
    assert kept.get("b", "r", 1.0) is None
    assert not kept.delete("b", "r", 1.0)
    assert kept.delete("a", "r", 1.0)
    assert kept.get("a", "r", 1.0) is None
    assert kept.num_bytes == 0


def test_it_expires():
    kept = store(keep_s=10.0)
    kept.put("a", "r", stored(), 0.0)
    assert kept.get("a", "r", 9.9) is not None
    assert kept.get("a", "r", 10.0) is None
    assert len(kept) == 0


def test_the_oldest_goes_when_there_are_too_many():
    kept = store(max_stored=2)
    for number in range(3):
        kept.put(f"tenant {number}", f"r{number}", stored(), float(number))
    assert kept.get("tenant 0", "r0", 3.0) is None
    assert kept.get("tenant 2", "r2", 3.0) is not None


def test_who_has_most_of_the_room_loses_its_own():
    kept = store(max_stored=4)
    kept.put("small", "s", stored(), 0.0)
    for number in range(10):
        kept.put("large", f"r{number}", stored(), 1.0)
    assert kept.get("small", "s", 2.0) is not None
    assert len(kept) == 4


def test_what_is_larger_than_the_store_is_not_kept():
    kept = store(max_stored_bytes=1000)
    kept.put("a", "small", stored(600), 0.0)
    kept.put("a", "large", stored(1001), 0.0)
    assert kept.get("a", "large", 0.0) is None
    assert kept.get("a", "small", 0.0) is not None


def test_one_large_response_stays_though_it_takes_most_of_the_room():
    kept = store(max_stored_bytes=2000)
    kept.put("a", "old", stored(1000), 0.0)
    kept.put("b", "new", stored(1800), 0.0)
    assert kept.get("b", "new", 0.0) is not None
    assert kept.get("a", "old", 0.0) is None


def test_random_walk_keeps_its_accounts():
    draw = random.Random(7)
    kept = store(max_stored=20, max_stored_bytes=20_000, keep_s=30.0)
    now_s = 0.0
    for _ in range(3000):
        now_s += draw.random()
        tenant, response_id = draw.choice("abc"), f"r{draw.randrange(60)}"
        match draw.randrange(4):
            case 0:
                kept.delete(tenant, response_id, now_s)
            case 1:
                kept.get(tenant, response_id, now_s)
            case _:
                kept.put(tenant, response_id, stored(ENTRY_BYTES + draw.randrange(4000)), now_s)
        kept.check()


@pytest.mark.parametrize("name", ["max_stored", "max_stored_bytes", "keep_s", "max_background"])
def test_limits_are_positive(name):
    with pytest.raises(ConfigError, match=name):
        ResponsesConfig(**{name: 0})
