"""Several copies over one real Redis: exact together, alive without it, healed after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from baton.core.errors import Unavailable
from baton.core.metrics import QUOTA_ANSWERS, ROUTER_COPIES, SHARED_GARBAGE, SHARED_UP
from baton.core.worker_info import WorkerId
from baton.telemetry.metrics import Metrics
from redis_server import RedisServer, server_binaries
from services.router.shared.config import SharedConfig
from services.router.shared.opening import open_shared
from services.router.shared.state import (
    PlacementNote,
    QuotaAnswer,
    QuotaKind,
    QuotaLimits,
    SharedState,
    TenantRecord,
    hash_key,
)

DEADLINE_S = 20.0
PREFIX = "baton:1:test:"
NOTE = PlacementNote(bytes(range(32)), WorkerId("p-0"), WorkerId("d-0"), 100, 228)


class Copy:
    """A started router's shared state with its metrics."""

    def __init__(self, name: str, config: SharedConfig) -> None:
        self.metrics = Metrics()
        self.state: SharedState = open_shared(config, copy_id=name, metrics=self.metrics)

    def value(self, name: str) -> float:
        """The sum over the label sets of a series, 0 when it has none."""
        lines = self.metrics.render().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    async def take(self, limits: QuotaLimits, num_tokens: int = 1) -> QuotaAnswer:
        return await self.state.take_quota("acme", limits=limits, num_tokens=num_tokens)


StartCopy = Callable[..., Awaitable[Copy]]


def config_of(redis: RedisServer, **changes: float) -> SharedConfig:
    """A budget that a busy machine does not overrun, and copies that are found dead soon."""
    values = {"budget_s": 5.0, "copy_ttl_s": 2.0, "slot_ttl_s": 3.0} | changes
    return SharedConfig(url=redis.url, deployment="test", **values)  # type: ignore[arg-type]


@pytest.fixture
async def start_copy(redis: RedisServer) -> AsyncIterator[StartCopy]:
    copies: list[Copy] = []

    async def start(name: str = "one", **changes: float) -> Copy:
        copy = Copy(name, config_of(redis, **changes))
        await copy.state.start()
        copies.append(copy)
        return copy

    yield start
    for copy in copies:
        await copy.state.stop()
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not [n for n in names if "shared state" in n or "placements" in n or "client" in n]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


def is_up(copy: Copy) -> bool:
    return copy.state.status().is_up


async def test_two_copies_grant_exactly_the_limit(start_copy: StartCopy) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    for kind in QuotaKind:
        limits = QuotaLimits(**{kind.value: 40})  # type: ignore[arg-type]
        calls = [
            copy.state.take_quota(kind.value, limits=limits, num_tokens=1)
            for _ in range(60)
            for copy in (one, two)
        ]
        answers = await asyncio.gather(*calls)
        # The buckets fill by less than one while this runs, unless it takes more than 1.5 s.
        granted = sum(answer.is_granted for answer in answers)
        assert 40 <= granted <= (40 if kind is QuotaKind.CONCURRENCY else 44)
        assert not any(answer.is_estimated for answer in answers)
        assert {a.exceeded for a in answers if not a.is_granted} == {kind}
        assert all(a.retry_after_s > 0 for a in answers if not a.is_granted)


async def test_a_slot_given_back_on_one_copy_is_free_on_the_other(start_copy: StartCopy) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    limits = QuotaLimits(max_concurrent=1)
    first = await one.take(limits)
    assert first.is_granted and not (await two.take(limits)).is_granted
    one.state.return_quota(first.grant)
    one.state.return_quota(first.grant)
    async with asyncio.timeout(DEADLINE_S):
        while not (await two.take(limits)).is_granted:
            await asyncio.sleep(0.01)
    assert not (await one.take(limits)).is_granted


async def test_request_that_never_was_is_not_counted(start_copy: StartCopy) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    limits = QuotaLimits(requests_per_minute=1, tokens_per_minute=1000, max_concurrent=1)
    held = await one.take(limits, 1)
    assert held.is_granted and not (await two.take(limits, 1)).is_granted
    rates = QuotaLimits(requests_per_minute=1, tokens_per_minute=1000)
    more = await one.state.take_quota("acme", limits=rates, num_tokens=600, num_requests=0)
    assert more.is_granted and more.remaining_tokens is not None and more.remaining_tokens < 500
    one.state.return_quota(more.grant, num_unused_tokens=600)
    one.state.return_quota(held.grant, num_unused_tokens=1, num_unused_requests=1)
    async with asyncio.timeout(DEADLINE_S):
        while not (await two.take(limits, 900)).is_granted:
            await asyncio.sleep(0.01)


async def test_unused_tokens_come_back_once(start_copy: StartCopy) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    limits = QuotaLimits(tokens_per_minute=1000)
    first = await one.take(limits, 900)
    assert first.is_granted and not (await two.take(limits, 500)).is_granted
    for _ in range(3):
        one.state.return_quota(first.grant, num_unused_tokens=450)
    async with asyncio.timeout(DEADLINE_S):
        while not (await two.take(limits, 500)).is_granted:
            await asyncio.sleep(0.01)
    assert not (await two.take(limits, 500)).is_granted


async def test_running_requests_keep_their_slots_and_a_dead_routers_lapse(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    limits = QuotaLimits(max_concurrent=1)
    assert (await one.take(limits)).is_granted
    await asyncio.sleep(4.0)
    assert not (await two.take(limits)).is_granted
    await until(lambda: two.state.status().num_copies == 2)
    # As if killed: no sign of life, nothing given back.
    keeper = one.state._keeper  # type: ignore[attr-defined]
    keeper.cancel()
    async with asyncio.timeout(DEADLINE_S):
        while not (await two.take(limits)).is_granted:
            await asyncio.sleep(0.05)
    await until(lambda: two.state.status().num_copies == 1)


async def test_copies_count_each_other(start_copy: StartCopy) -> None:
    copies = [await start_copy(f"copy-{i}") for i in range(3)]
    await until(lambda: all(c.state.status().num_copies == 3 for c in copies))
    assert copies[0].value(ROUTER_COPIES.name) == 3
    await copies[2].state.stop()
    await until(lambda: all(c.state.status().num_copies == 2 for c in copies[:2]))


async def test_nothing_but_keys_stays_after_a_clean_stop(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one = await start_copy("one")
    limits = QuotaLimits(100, 1000, 5)
    grants = [await one.take(limits) for _ in range(3)]
    one.state.return_quota(grants[0].grant)
    await one.state.stop()
    with redis.client() as client:
        names = {name.decode().removeprefix(PREFIX) for name in client.scan_iter()}
        # The bucket remembers what was used this minute.
        assert names <= {"quota:acme", "slots:acme"}
        assert all(client.ttl(f"{PREFIX}{name}") > 0 for name in names)
        assert client.zcard(f"{PREFIX}slots:acme") == 0


async def test_placements_reach_the_other_copies_only(start_copy: StartCopy) -> None:
    copies = [await start_copy(f"copy-{i}") for i in range(3)]
    heard: list[list[PlacementNote]] = [[], [], []]
    for copy, notes in zip(copies, heard, strict=True):
        copy.state.on_placement(notes.append)
    await until(lambda: all(c.state.status().num_copies == 3 for c in copies))
    async with asyncio.timeout(DEADLINE_S):
        while not (heard[1] and heard[2]):
            # Listeners may take a moment longer than signs of life.
            copies[0].state.publish_placement(NOTE)
            await asyncio.sleep(0.05)
    assert heard[0] == [] and heard[1][0] == NOTE and heard[2][0] == NOTE


async def test_a_listener_that_fails_or_garbage_stops_no_placements(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    heard: list[PlacementNote] = []

    def listener(note: PlacementNote) -> None:
        heard.append(note)
        raise RuntimeError("the index is broken")

    two.state.on_placement(listener)
    await until(lambda: one.state.status().num_copies == 2)
    with redis.client() as client:
        for junk in (
            b"",
            b"junk",
            b"BPN1",
            b"BPN1\x03one\xff\xff",
            b"BPN1\x02\xff\xfe",
            b"\0" * 99,
        ):
            client.publish(f"{PREFIX}placements", junk)
    async with asyncio.timeout(DEADLINE_S):
        while len(heard) < 2:
            one.state.publish_placement(NOTE)
            await asyncio.sleep(0.05)
    assert two.value(SHARED_GARBAGE.name) >= 5
    assert is_up(two)


async def test_killed_redis_costs_estimates_only_and_heals(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    await until(lambda: one.state.status().num_copies == two.state.status().num_copies == 2)
    limits = QuotaLimits(requests_per_minute=20)
    for _ in range(4):
        assert (await one.take(limits)).is_granted
        assert (await two.take(limits)).is_granted
    redis.kill()
    for copy in (one, two):
        answers = [await copy.take(limits) for _ in range(12)]
        # Twelve of twenty were left by then or soon after, six for each copy; a copy that has just
        # asked knows of its own request and not of the other's.
        assert 5 <= sum(answer.is_granted for answer in answers) <= 8
        assert all(answer.is_estimated for answer in answers)
        assert not is_up(copy) and copy.value(SHARED_UP.name) == 0
        assert copy.state.status().reason
        assert copy.value(QUOTA_ANSWERS.name) >= 12
    redis.start()
    await until(lambda: is_up(one) and is_up(two))
    # Redis came back empty; what the copies granted meanwhile is charged to it.
    answers = [await copy.take(limits) for copy in (one, two) for _ in range(15)]
    assert not any(answer.is_estimated for answer in answers)
    assert sum(answer.is_granted for answer in answers) <= 12
    assert one.value(SHARED_UP.name) == 1
    await until(lambda: one.state.status().num_copies == two.state.status().num_copies == 2)


async def test_slots_are_known_again_to_a_redis_that_came_back_empty(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    await until(lambda: two.state.status().num_copies == 2)
    limits = QuotaLimits(max_concurrent=4)
    before = [await one.take(limits) for _ in range(2)]
    redis.kill()
    await until(lambda: not is_up(one) and not is_up(two))
    during = [await two.take(limits) for _ in range(3)]
    assert [a.is_granted for a in before + during] == [True, True, True, True, False]
    redis.start()
    await until(lambda: is_up(one) and is_up(two))
    assert not (await one.take(limits)).is_granted
    one.state.return_quota(before[0].grant)
    two.state.return_quota(during[0].grant)
    async with asyncio.timeout(DEADLINE_S):
        while not (await one.take(limits)).is_granted:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(DEADLINE_S):
        while not (await two.take(limits)).is_granted:
            await asyncio.sleep(0.01)
    assert not (await one.take(limits)).is_granted


async def test_frozen_redis_opens_the_circuit_after_a_few_budgets(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one = await start_copy("one", budget_s=0.05)
    limits = QuotaLimits(max_concurrent=1000)
    redis.freeze()
    try:
        loop = asyncio.get_running_loop()
        started_at_s = loop.time()
        answers = [await one.take(limits) for _ in range(200)]
        # Far below 200 budgets: a store that does not answer is not asked again and again.
        assert loop.time() - started_at_s < 5.0
        assert all(answer.is_granted for answer in answers)
        assert sum(answer.is_estimated for answer in answers) >= 199
        assert not is_up(one)
        with pytest.raises(Unavailable, match="cannot be checked"):
            await one.state.key_owner(hash_key("never seen"))
    finally:
        redis.thaw()
    await until(lambda: is_up(one))


async def test_keys_are_answered_from_the_last_view_while_redis_is_away(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one, two = await start_copy("one", key_fresh_s=0.2), await start_copy("two", key_stale_s=0.3)
    record = TenantRecord("acme", QuotaLimits(requests_per_minute=7))
    await one.state.put_key(hash_key("k"), record)
    assert await two.state.key_owner(hash_key("k")) == record
    assert await two.state.key_owner(hash_key("other")) is None
    assert await one.state.list_keys() == {hash_key("k"): record}
    redis.kill()
    await asyncio.sleep(0.4)
    # On both the answer is too old to be fresh; on the second it is too old altogether.
    assert await one.state.key_owner(hash_key("k")) == record
    with pytest.raises(Unavailable, match="cannot be checked"):
        await one.state.key_owner(hash_key("other"))
    with pytest.raises(Unavailable):
        await one.state.put_key(hash_key("k2"), record)
    redis.start()
    await until(lambda: is_up(one))
    assert await one.state.key_owner(hash_key("k")) is None


async def test_a_removed_key_is_refused_by_all_copies_soon(start_copy: StartCopy) -> None:
    one, two = await start_copy("one"), await start_copy("two", key_fresh_s=0.1)
    await one.state.put_key(hash_key("k"), TenantRecord("acme"))
    assert await two.state.key_owner(hash_key("k")) is not None
    assert await one.state.remove_key(hash_key("k"))
    assert await one.state.key_owner(hash_key("k")) is None
    async with asyncio.timeout(DEADLINE_S):
        while await two.state.key_owner(hash_key("k")) is not None:
            await asyncio.sleep(0.02)


async def test_a_damaged_key_is_counted_and_the_last_good_answer_holds(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one = await start_copy("one", key_fresh_s=0.01)
    await one.state.put_key(hash_key("k"), TenantRecord("acme"))
    with redis.client() as client:
        client.set(f"{PREFIX}key:{hash_key('k')}", "junk")
        client.set(f"{PREFIX}key:{hash_key('new')}", "junk")
    await asyncio.sleep(0.05)
    assert await one.state.key_owner(hash_key("k")) == TenantRecord("acme")
    with pytest.raises(Unavailable, match="cannot be checked"):
        await one.state.key_owner(hash_key("new"))
    assert one.value(SHARED_GARBAGE.name) == 2
    assert is_up(one)


async def test_many_requests_of_one_client_ask_once(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    one = await start_copy("one")
    with redis.client() as client:
        client.config_resetstat()
        await asyncio.gather(*(one.state.key_owner(hash_key("k")) for _ in range(50)))
        assert client.info("commandstats")["cmdstat_getrange"]["calls"] == 1


async def test_a_cancelled_question_leaves_no_slot_behind(start_copy: StartCopy) -> None:
    one = await start_copy("one")
    limits = QuotaLimits(max_concurrent=5)
    for _ in range(20):
        task = asyncio.create_task(one.take(limits))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.2)
    answers = [await one.take(limits) for _ in range(6)]
    assert [a.is_granted for a in answers] == [True] * 5 + [False]


async def test_a_router_starts_without_redis_and_joins_later(
    start_copy: StartCopy, redis: RedisServer
) -> None:
    redis.kill()
    one = await start_copy("one")
    assert not is_up(one)
    assert (await one.take(QuotaLimits(requests_per_minute=5))).is_estimated
    redis.start()
    await until(lambda: is_up(one))
    assert not (await one.take(QuotaLimits(requests_per_minute=5))).is_estimated


@pytest.mark.parametrize("binary", server_binaries(), ids=lambda path: path.name)
async def test_every_server_with_a_password(tmp_path: Path, binary: Path) -> None:
    server = RedisServer(tmp_path, binary=binary, password="p@ss/word")
    server.start()
    try:
        good = Copy("one", config_of(server))
        wrong_url = server.url.replace("ss%2Fword", "wrong")
        bad = Copy("two", SharedConfig(url=wrong_url, deployment="test"))
        await good.state.start()
        await bad.state.start()
        assert is_up(good) and not is_up(bad)
        assert "password" in bad.state.status().reason
        assert "wrong" not in bad.state.status().reason
        limits = QuotaLimits(10, 1000, 2)
        answers = [await good.take(limits) for _ in range(3)]
        assert [a.is_granted for a in answers] == [True, True, False]
        assert not answers[0].is_estimated
        await good.state.stop()
        await bad.state.stop()
    finally:
        server.stop()
