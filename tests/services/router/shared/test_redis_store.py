"""The Redis store against a real server: same answers as the ledger, damaged values refused."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from redis_server import RedisServer
from services.router.shared.ledger import TenantLedger
from services.router.shared.redis_store import RedisStore
from services.router.shared.state import QuotaKind, QuotaLimits, TenantRecord, hash_key
from services.router.shared.store import Beat, GarbageValue, HeldSlot, Refund, Take

TENANTS = ("acme", "größe & co", "a:b/c%20{x}")
PREFIX = "baton:1:test:"


class Garbage(list[tuple[str, str]]):
    def __call__(self, kind: str, reason: str) -> None:
        self.append((kind, reason))


@pytest.fixture
def garbage() -> Garbage:
    return Garbage()


@pytest.fixture
async def store(redis: RedisServer, garbage: Garbage) -> AsyncIterator[RedisStore]:
    store = RedisStore(redis.url, deployment="test", on_garbage=garbage)
    yield store
    await store.close()


def take(
    tenant: str = "acme",
    slot: str = "s",
    *,
    requests: int | None = None,
    tokens: int | None = None,
    concurrent: int | None = None,
    num_tokens: int = 1,
    num_requests: int = 1,
) -> Take:
    limits = QuotaLimits(requests, tokens, concurrent)
    return Take(tenant, limits, num_requests, num_tokens, slot, 15.0)


async def test_random_walk_gives_the_answers_of_the_ledger(
    store: RedisStore, garbage: Garbage
) -> None:
    rng = random.Random(5)
    ledgers = {tenant: TenantLedger() for tenant in TENANTS}
    copies: dict[str, float] = {}
    now_s = 1_700_000_000.0
    limits = {
        tenant: QuotaLimits(
            rng.choice([None, 3, 60]), rng.choice([None, 500, 100_000]), rng.choice([None, 4])
        )
        for tenant in TENANTS
    }
    held: list[Take] = []
    for step in range(1500):
        now_s += rng.choice([0.0, 0.001, 0.3, 2.0, 20.0])
        tenant = rng.choice(TENANTS)
        if rng.random() < 0.02:
            limits[tenant] = QuotaLimits(rng.choice([None, 5, 600]), 800, rng.choice([2, 8]))
        if rng.random() < 0.6:
            wanted = Take(
                tenant, limits[tenant], 1, rng.choice([0, 1, 70, 900]), f"slot-{step}", 15.0
            )
            expected = ledgers[tenant].take(
                wanted.limits,
                num_requests=1,
                num_tokens=wanted.num_tokens,
                slot=wanted.slot,
                slot_ttl_s=wanted.slot_ttl_s,
                now_s=now_s,
            )
            answer = await store.take(wanted, now_s=now_s)
            assert answer.is_granted == expected.is_granted, step
            assert answer.exceeded == expected.exceeded, step
            assert answer.retry_after_s == pytest.approx(expected.retry_after_s, abs=1e-5)
            assert answer.request_level == pytest.approx(expected.request_level, abs=1e-4)
            assert answer.token_level == pytest.approx(expected.token_level, abs=1e-4)
            if answer.is_granted:
                held.append(wanted)
        elif held:
            ended = held.pop(rng.randrange(len(held)))
            refund = Refund(
                ended.tenant,
                limits[ended.tenant],
                num_tokens=rng.randint(-5, ended.num_tokens),
                slot=ended.slot,
                only_if_held=rng.random() < 0.3,
            )
            ledgers[ended.tenant].give_back(
                refund.limits,
                num_requests=0,
                num_tokens=refund.num_tokens,
                slot=refund.slot,
                only_if_held=refund.only_if_held,
                now_s=now_s,
            )
            await store.refund([refund], now_s=now_s)
        if rng.random() < 0.1:
            slots = tuple(HeldSlot(h.tenant, h.slot) for h in held if h.limits.max_concurrent)
            beat = Beat(rng.choice(["one", "two"]), 8.0, slots, 15.0)
            copies[beat.copy_id] = now_s + beat.copy_ttl_s
            for slot in slots:
                ledgers[slot.tenant].slots[slot.slot] = now_s + beat.slot_ttl_s
            expected_copies = sum(ends_at_s > now_s for ends_at_s in copies.values())
            assert await store.beat(beat, now_s=now_s) == expected_copies, step
    assert garbage == []


async def test_what_needs_more_than_a_bucket_is_granted_on_a_full_one(store: RedisStore) -> None:
    answer = await store.take(take(tokens=100, num_tokens=400), now_s=1e9)
    assert answer.is_granted and answer.token_level == -300
    answer = await store.take(take(tokens=100, num_tokens=1), now_s=1e9)
    assert not answer.is_granted and answer.exceeded is QuotaKind.TOKENS
    assert answer.retry_after_s == pytest.approx(301 * 60 / 100)
    answer = await store.take(take(tokens=100, num_tokens=1), now_s=1e9 + answer.retry_after_s)
    assert answer.is_granted


@pytest.mark.parametrize("limit", [{"requests": 5}, {"tokens": 5}, {"concurrent": 5}])
async def test_a_refusal_takes_nothing(store: RedisStore, limit: dict[str, int]) -> None:
    for i in range(5):
        assert (await store.take(take(slot=f"{i}", **limit), now_s=1e9)).is_granted
    other = {"requests": 1000, "tokens": 1000, "concurrent": 1000} | limit
    for i in range(20):
        answer = await store.take(take(slot=f"x{i}", **other), now_s=1e9)
        assert not answer.is_granted
    levels = (answer.request_level, answer.token_level)
    assert all(level in (0, 1000) for level in levels)


async def test_slots_of_a_killed_router_lapse(store: RedisStore) -> None:
    assert (await store.take(take(slot="dead", concurrent=1), now_s=1e9)).is_granted
    assert not (await store.take(take(slot="b", concurrent=1), now_s=1e9 + 14.9)).is_granted
    assert (await store.take(take(slot="b", concurrent=1), now_s=1e9 + 15.1)).is_granted


async def test_an_undo_refunds_only_what_was_taken(store: RedisStore) -> None:
    await store.take(take(slot="a", tokens=100, concurrent=5, num_tokens=60), now_s=1e9)
    limits = QuotaLimits(None, 100, 5)
    never = Refund("acme", limits, num_tokens=60, slot="never", only_if_held=True)
    await store.refund([never], now_s=1e9)
    answer = await store.take(take(slot="b", tokens=100, concurrent=5, num_tokens=0), now_s=1e9)
    assert answer.token_level == 40
    undo = Refund("acme", limits, num_tokens=60, slot="a", only_if_held=True)
    await store.refund([undo, undo], now_s=1e9)
    answer = await store.take(take(slot="c", tokens=100, concurrent=5, num_tokens=0), now_s=1e9)
    assert answer.token_level == 100


@pytest.mark.parametrize("command", [
    ("SET", "quota:acme", "junk"),
    ("HSET", "quota:acme", "requests", "junk", "tokens", "\x00\xff", "at", "1e9"),
    ("HSET", "quota:acme", "requests", "nan", "tokens", "inf", "at", "1e9"),
    ("HSET", "quota:acme", "requests", "-1e300", "at", "later"),
    ("LPUSH", "slots:acme", "junk"),
    ("SET", "slots:acme", "junk"),
])  # fmt: skip
async def test_a_damaged_quota_is_refused_and_starts_anew(
    store: RedisStore, redis: RedisServer, garbage: Garbage, command: tuple[str, ...]
) -> None:
    with redis.client() as client:
        client.execute_command(command[0], PREFIX + command[1], *command[2:])
    answer = await store.take(take(requests=3, tokens=10, concurrent=2))
    assert answer.is_granted and (answer.request_level, answer.token_level) == (2, 9)
    assert [kind for kind, _ in garbage] == ["quota"]
    assert "acme" in garbage[0][1]
    answer = await store.take(take(requests=3, tokens=10, concurrent=2))
    assert answer.is_granted and len(garbage) == 1


async def test_a_slot_leased_for_ever_is_nobodys(store: RedisStore, redis: RedisServer) -> None:
    with redis.client() as client:
        client.zadd(f"{PREFIX}slots:acme", {"junk": 1e18, "other": float("inf")})
    assert (await store.take(take(slot="a", concurrent=1))).is_granted


async def test_damaged_copies_are_counted_anew(
    store: RedisStore, redis: RedisServer, garbage: Garbage
) -> None:
    with redis.client() as client:
        client.set(f"{PREFIX}copies", "junk")
    assert await store.beat(Beat("one", 8.0, (), 15.0)) == 1
    assert [kind for kind, _ in garbage] == ["copies"]
    assert await store.beat(Beat("two", 8.0, (), 15.0)) == 2
    await store.leave("one")
    assert await store.beat(Beat("two", 8.0, (), 15.0)) == 1


async def test_keys_are_stored_as_hashes(store: RedisStore, redis: RedisServer) -> None:
    record = TenantRecord("acme", QuotaLimits(10, 1000, 3), weight=2.0, priority=5, slo_class="x")
    await store.write_key(hash_key("sk-secret"), record)
    assert await store.read_key(hash_key("sk-secret")) == record
    assert await store.read_key(hash_key("sk-other")) is None
    assert await store.list_keys() == {hash_key("sk-secret"): record}
    with redis.client() as client:
        assert all(b"sk-secret" not in name for name in client.scan_iter())
    assert await store.delete_key(hash_key("sk-secret"))
    assert not await store.delete_key(hash_key("sk-secret"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"junk", "JSON"),
        (b"[]", "not a JSON object"),
        (b'{"format": 9}', "format"),
        (b'{"format": 1}', "tenant"),
        (b'{"format": 1, "tenant": ""}', "tenant"),
        (b'{"format": 1, "tenant": "a", "extra": 1}', "unknown setting extra"),
        (b'{"format": 1, "tenant": "a", "weight": -1}', "weight"),
        (b'{"format": 1, "tenant": "a", "limits": {"max_concurrent": 0}}', "max_concurrent"),
        (b'{"format": 1, "tenant": "a", "limits": 7}', "limits"),
        (b'{"format": 1, "tenant": {"a": 1}}', "tenant"),
        (b"\xff\xfe\x00", "JSON"),
        (b'{"format": 1, "tenant": "a"}' + b" " * 5000, "bytes"),
    ],
)
async def test_a_damaged_key_record_is_refused_with_its_reason(
    store: RedisStore, redis: RedisServer, garbage: Garbage, value: bytes, reason: str
) -> None:
    with redis.client() as client:
        client.set(f"{PREFIX}key:{hash_key('k')}", value)
    with pytest.raises(GarbageValue, match=reason):
        await store.read_key(hash_key("k"))
    assert await store.list_keys() == {}
    assert len(garbage) == 1


async def test_a_key_record_of_another_type_is_refused(
    store: RedisStore, redis: RedisServer
) -> None:
    with redis.client() as client:
        client.lpush(f"{PREFIX}key:{hash_key('k')}", "junk")
    with pytest.raises(GarbageValue, match="WRONGTYPE"):
        await store.read_key(hash_key("k"))


async def test_all_but_keys_has_a_time_to_live(store: RedisStore, redis: RedisServer) -> None:
    await store.take(take(requests=3, tokens=10, concurrent=2, num_tokens=10**9))
    await store.refund([Refund("other", QuotaLimits(None, 100, None), num_tokens=-50)])
    await store.beat(Beat("one", 8.0, (HeldSlot("third", "s"),), 15.0))
    with redis.client() as client:
        names = list(client.scan_iter())
        assert len(names) == 5
        assert all(0 < client.ttl(name) <= 86400 for name in names)
