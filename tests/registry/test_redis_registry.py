"""The registry in Redis against a real server and, over random steps, against a model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from baton.core.errors import ConfigError, Unavailable
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry import redis_registry
from baton.registry.redis_registry import RedisRegistry
from baton.registry.registry import Snapshot
from redis_server import RedisServer

DEADLINE_S = 20.0
PREFIX = "baton:1:test:workers:"


def make_info(name: str = "prefill-1", *, epoch: str = "e1") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        epoch=Epoch(epoch),
        role=Role.PREFILL,
        address="127.0.0.1:1",
        model_name="m",
        layout=KvLayout("m", 2, 1, 4, 4, "float32"),
        num_blocks=8,
        max_model_len=64,
        max_num_seqs=4,
        transport="shm",
        pid=1,
    )


@pytest.fixture
def garbage() -> list[str]:
    return []


@pytest.fixture
async def registry(redis: RedisServer, garbage: list[str]) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry(redis.url, deployment="test", on_garbage=garbage.append)
    yield registry
    await registry.close()


class Watcher:
    """Collects what `watch` yields."""

    def __init__(self, registry: RedisRegistry) -> None:
        self.snapshots: list[Snapshot] = []
        self._task = asyncio.create_task(self._follow(registry))

    async def _follow(self, registry: RedisRegistry) -> None:
        async with aclosing(registry.watch()) as snapshots:
            async for snapshot in snapshots:
                self.snapshots.append(snapshot)

    @property
    def names(self) -> set[str]:
        return set(self.snapshots[-1]) if self.snapshots else set()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
async def watcher(registry: RedisRegistry) -> AsyncIterator[Watcher]:
    watcher = Watcher(registry)
    yield watcher
    await watcher.stop()
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "registry messages"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_registered_worker_is_listed_with_all_its_fields(registry: RedisRegistry) -> None:
    info = make_info()
    await registry.register(info, ttl_s=5)
    assert await registry.list() == {info.worker_id: info}


async def test_registration_is_gone_after_its_time_to_live(registry: RedisRegistry) -> None:
    await registry.register(make_info(), ttl_s=0.2)
    assert await registry.list()
    await asyncio.sleep(0.3)
    assert not await registry.list()
    assert not await registry.renew(WorkerId("prefill-1"), Epoch("e1"))


async def test_renewal_starts_the_time_to_live_anew(registry: RedisRegistry) -> None:
    await registry.register(make_info(), ttl_s=2.0)
    for _ in range(5):
        await asyncio.sleep(0.6)
        assert await registry.renew(WorkerId("prefill-1"), Epoch("e1"))
    assert await registry.list()


async def test_an_older_epoch_changes_nothing_any_more(registry: RedisRegistry) -> None:
    worker_id = WorkerId("prefill-1")
    await registry.register(make_info(epoch="old"), ttl_s=60)
    await registry.register(make_info(epoch="new"), ttl_s=60)
    assert not await registry.renew(worker_id, Epoch("old"))
    await registry.deregister(worker_id, Epoch("old"))
    with pytest.raises(Unavailable, match="started later"):
        await registry.register(make_info(epoch="old"), ttl_s=60)
    assert (await registry.list())[worker_id].epoch == "new"
    assert await registry.renew(worker_id, Epoch("new"))
    await registry.deregister(worker_id, Epoch("new"))
    # Its replacement is gone, so it may come back.
    await registry.register(make_info(epoch="old"), ttl_s=60)
    assert (await registry.list())[worker_id].epoch == "old"


@pytest.mark.parametrize("name", ["", "a/b", "../x", "ä", "-a", "a" * 129])
async def test_unusable_worker_ids_are_refused(registry: RedisRegistry, name: str) -> None:
    with pytest.raises(ConfigError, match="worker id"):
        await registry.register(make_info(name), ttl_s=5)


async def test_deployments_do_not_see_each_other(
    registry: RedisRegistry, redis: RedisServer
) -> None:
    other = RedisRegistry(redis.url, deployment="other")
    await registry.register(make_info(), ttl_s=60)
    assert await other.list() == {}
    await other.close()


async def test_random_steps_against_a_model(registry: RedisRegistry, redis: RedisServer) -> None:
    rng = random.Random(11)
    live: dict[str, str] = {}
    past: dict[str, set[str]] = {}
    with redis.client() as client:
        for step in range(2000):
            name, epoch = f"w-{rng.randrange(4)}", f"e{rng.randrange(5)}"
            worker_id = WorkerId(name)
            match rng.randrange(5):
                case 0:
                    other = live.get(name)
                    if other not in (None, epoch) and epoch in past.get(name, set()):
                        with pytest.raises(Unavailable):
                            await registry.register(make_info(name, epoch=epoch), ttl_s=900)
                    else:
                        await registry.register(make_info(name, epoch=epoch), ttl_s=900)
                        if other not in (None, epoch):
                            past.setdefault(name, set()).add(str(other))
                        past.setdefault(name, set()).discard(epoch)
                        live[name] = epoch
                case 1:
                    is_renewed = await registry.renew(worker_id, Epoch(epoch))
                    assert is_renewed == (live.get(name) == epoch), step
                case 2:
                    await registry.deregister(worker_id, Epoch(epoch))
                    if live.get(name) == epoch:
                        del live[name]
                case 3 if name in live:
                    # Its lease ends.
                    client.zadd(f"{PREFIX}lease", {name: 1.0})
                    del live[name]
            listed = await registry.list()
            assert {n: info.epoch for n, info in listed.items()} == live, step
        assert client.hlen(f"{PREFIX}info") == client.zcard(f"{PREFIX}lease") == len(live)


async def test_watch_shows_every_change(registry: RedisRegistry, watcher: Watcher) -> None:
    await until(lambda: watcher.snapshots == [{}])
    await registry.register(make_info("a"), ttl_s=60)
    await until(lambda: watcher.names == {"a"})
    await registry.register(make_info("b"), ttl_s=0.3)
    await until(lambda: watcher.names == {"a", "b"})
    await until(lambda: watcher.names == {"a"})
    await registry.register(make_info("a", epoch="e2"), ttl_s=60)
    await until(lambda: watcher.snapshots[-1][WorkerId("a")].epoch == "e2")
    await registry.deregister(WorkerId("a"), Epoch("e2"))
    await until(lambda: watcher.names == set())


async def test_watch_needs_no_messages(
    registry: RedisRegistry, watcher: Watcher, redis: RedisServer
) -> None:
    await until(lambda: watcher.snapshots == [{}])
    with redis.client() as client:
        client.client_kill_filter(_type="pubsub", skipme=False)
    await registry.register(make_info("a"), ttl_s=60)
    await until(lambda: watcher.names == {"a"})


async def test_killed_redis_takes_no_workers_away(
    registry: RedisRegistry, watcher: Watcher, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_registry, "HOLD_S", 2.0)
    await watcher.stop()
    watcher = Watcher(registry)
    for name in ("a", "b", "dead"):
        await registry.register(make_info(name), ttl_s=60)
    await until(lambda: watcher.names == {"a", "b", "dead"})
    redis.kill()
    with pytest.raises(Unavailable, match="cannot be reached"):
        await registry.list()
    with pytest.raises(Unavailable):
        await registry.renew(WorkerId("a"), Epoch("e1"))
    redis.start()
    # It came back empty: workers learn it from their renewals and announce themselves again.
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                assert not await registry.renew(WorkerId("a"), Epoch("e1"))
                break
            except Unavailable:
                await asyncio.sleep(0.05)
    num_before = len(watcher.snapshots)
    await registry.register(make_info("a"), ttl_s=60)
    await registry.register(make_info("b"), ttl_s=60)
    await until(lambda: watcher.names == {"a", "b"})
    assert all({"a", "b"} <= set(s) for s in watcher.snapshots[num_before - 1 :])
    await watcher.stop()


async def test_a_worker_that_leaves_after_the_outage_is_gone_at_once(
    registry: RedisRegistry, watcher: Watcher, redis: RedisServer
) -> None:
    await registry.register(make_info("a"), ttl_s=60)
    await until(lambda: watcher.names == {"a"})
    with redis.client() as client:
        client.flushall()
    await registry.register(make_info("a", epoch="e2"), ttl_s=60)
    await until(lambda: watcher.snapshots[-1][WorkerId("a")].epoch == "e2")
    await registry.deregister(WorkerId("a"), Epoch("e2"))
    await until(lambda: watcher.names == set())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"junk", "Expecting value"),
        (b"\xff\xfe", "codec"),
        (b"[]", "format"),
        (b'{"format": 7}', "format 7"),
        (b'{"format": 1}', "not an object"),
        (b'{"format": 1, "info": {"pid": 1}}', "missing"),
        (b'{"format": 1, "info": {"what": 1}}', "unknown setting"),
        (b"9" * 70_000, "bytes"),
    ],
)
async def test_damaged_registrations_hide_no_others_and_heal(
    registry: RedisRegistry, redis: RedisServer, garbage: list[str], value: bytes, reason: str
) -> None:
    await registry.register(make_info("good"), ttl_s=60)
    await registry.register(make_info("bad"), ttl_s=60)
    with redis.client() as client:
        client.hset(f"{PREFIX}info", "bad", value)
        client.hset(f"{PREFIX}info", "\xff", value)
    assert set(await registry.list()) == {"good"}
    assert len(garbage) == 1 and reason in garbage[0] and "bad" in garbage[0]
    # The worker is told that it has to announce itself again.
    assert not await registry.renew(WorkerId("bad"), Epoch("e1"))
    await registry.register(make_info("bad"), ttl_s=60)
    assert set(await registry.list()) == {"good", "bad"}


async def test_a_registration_under_another_name_is_refused(
    registry: RedisRegistry, redis: RedisServer, garbage: list[str]
) -> None:
    await registry.register(make_info("a"), ttl_s=60)
    with redis.client() as client:
        client.hset(f"{PREFIX}info", "b", client.hget(f"{PREFIX}info", "a"))
        client.zadd(f"{PREFIX}lease", {"b": 9e9, "endless": 9e18})
        client.zadd(f"{PREFIX}lease", {"b": client.zscore(f"{PREFIX}lease", "a")})
    assert set(await registry.list()) == {"a"}
    assert "it names 'a'" in garbage[0]


@pytest.mark.parametrize("name", ["info", "lease", "version", "generation", "past:a"])
async def test_keys_of_a_wrong_type_are_replaced(
    registry: RedisRegistry, redis: RedisServer, watcher: Watcher, name: str
) -> None:
    await registry.register(make_info("a"), ttl_s=60)
    await until(lambda: watcher.names == {"a"})
    with redis.client() as client:
        client.delete(PREFIX + name)
        client.execute_command("XADD", PREFIX + name, "*", "a", "b")
    for epoch in ("e2", "e3"):
        if not await registry.renew(WorkerId("a"), Epoch("e1")):
            await registry.register(make_info("a", epoch=epoch), ttl_s=60)
    await registry.register(make_info("b"), ttl_s=60)
    await until(lambda: watcher.names == {"a", "b"})


@pytest.mark.parametrize("name", ["version", "generation"])
async def test_keys_that_are_no_text_do_not_hide_the_workers(
    registry: RedisRegistry, redis: RedisServer, watcher: Watcher, name: str
) -> None:
    with redis.client() as client:
        client.set(PREFIX + name, b"\xff\xfe", px=60_000)
    assert await registry.list() == {}
    await registry.register(make_info("a"), ttl_s=60)
    await until(lambda: watcher.names == {"a"})


async def test_registration_nested_too_deeply_hides_no_other(
    registry: RedisRegistry, redis: RedisServer, garbage: list[str]
) -> None:
    for name in ("a", "b"):
        await registry.register(make_info(name), ttl_s=60)
    with redis.client() as client:
        client.hset(f"{PREFIX}info", "b", b"[" * 60_000)
    assert set(await registry.list()) == {"a"}
    assert "nested too deeply" in garbage[0]


async def test_everything_left_behind_has_a_time_to_live(
    registry: RedisRegistry, redis: RedisServer
) -> None:
    for epoch in ("e1", "e2"):
        await registry.register(make_info("a", epoch=epoch), ttl_s=60)
    await registry.list()
    await registry.deregister(WorkerId("a"), Epoch("e2"))
    with redis.client() as client:
        names = list(client.scan_iter())
        assert names and all(client.ttl(name) > 0 for name in names)
