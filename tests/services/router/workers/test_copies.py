"""Two router copies over the same fake workers and a real Redis: each knows what the other does."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from baton.core.metrics import SHARED_NOTES
from baton.core.worker_info import WorkerId
from services.router.core import RouterCore
from services.router.placement.policy_config import PolicyConfig
from services.router.shared.config import SharedConfig
from services.router.shared.state import PlacementNote

DEADLINE_S = 20.0


StartTwo = Callable[[], Awaitable[tuple[object, RouterCore]]]


@pytest.fixture
async def start_two(make_cluster, config, redis) -> AsyncIterator[StartTwo]:
    """A cluster of three prefill workers and one decode worker, and another router over it."""
    cores = []

    async def start():
        settings = dataclasses.replace(
            config,
            policy=PolicyConfig(local_prefill_max_tokens=0),
            shared=SharedConfig(url=redis.url, deployment="test", budget_s=5.0, copy_ttl_s=2.0),
        )
        cluster = await make_cluster(3, 1, config=settings)
        other = RouterCore(
            settings,
            tokenizers=cluster.core.dispatcher._catalogue._tokenizers,
            membership=cluster.membership,
            rng=random.Random(2),
        )
        other.start()
        cores.append(other)
        first = cluster.core
        await until(lambda: len(other.pool.view().workers) == 4)
        await until(lambda: all(c.shared.status().num_copies == 2 for c in (first, other)))
        return cluster, other

    yield start
    for core in cores:
        await core.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def heard(core: RouterCore, count: int) -> None:
    """`core` has taken in so many placements of its sibling."""
    name = f'{SHARED_NOTES.name}{{direction="received"}} '

    def received() -> float:
        lines = core.metrics.render().decode().splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    await until(lambda: received() >= count)


async def test_a_prompt_follows_its_siblings_prefix_before_any_event(start_two) -> None:
    cluster, other = await start_two()
    rng = random.Random(7)
    for round_ in range(12):
        prompt = [rng.randrange(1, 200) for _ in range(150)]
        before = {n: len(w.submitted) for n, w in cluster.workers.items()}
        await cluster.generate(prompt, 2)
        await heard(other, round_ + 1)
        # As workers do that have fallen idle.
        for worker in cluster.workers.values():
            worker.report()
        await until(lambda: not any(r.book.unreported_kv_tokens for r in other.pool.table.rows()))
        async for _ in other.dispatcher.generate(cluster.input([*prompt, 5, 6, 7], 2)):
            pass
        used = [len(w.submitted) - before[n] for n, w in cluster.workers.items() if n[0] == "p"]
        assert sorted(used) == [0, 0, 2]


async def test_work_just_sent_counts_on_the_other_copy_until_a_report(start_two) -> None:
    cluster, other = await start_two()
    row = other.pool.table.get(WorkerId("d0"))
    computing = other.pool.table.get(WorkerId("p1"))
    note = PlacementNote(bytes(96), WorkerId("p1"), WorkerId("d0"), 70, 100)

    def seen() -> tuple[int, int, int]:
        book = row.book
        return (
            book.unreported_prefill_tokens,
            book.unreported_kv_tokens,
            computing.book.unreported_prefill_tokens,
        )

    for number in range(1, 21):
        cluster.core.shared.publish_placement(note)
        await heard(other, number)
        # A worker's report may have come in between.
        if seen() == (0, 100, 70):
            break
    else:
        raise AssertionError(f"never seen before a report: {seen()}")
    assert row.book.num_in_flight == 0
    for worker in cluster.workers.values():
        worker.report()
    await until(lambda: not any(r.book.unreported_kv_tokens for r in other.pool.table.rows()))
    row.book.check_integrity()


async def test_a_placement_tells_all_that_others_need(start_two) -> None:
    cluster, other = await start_two()
    notes = []
    other.shared.on_placement(notes.append)
    await cluster.generate(list(range(1, 101)), 2)
    await until(lambda: len(notes) == 1)
    note = notes[0]
    assert note.kv_tokens == 100 and note.prefill_tokens == 100 and len(note.hashes) == 6 * 16
    assert note.prefill_worker in cluster.workers and note.decode_worker == "d0"


async def test_requests_go_on_while_redis_is_killed_and_comes_back(start_two, redis) -> None:
    cluster, other = await start_two()
    prompt = list(range(1, 101))

    async def both() -> None:
        cluster.assert_right(await cluster.generate(prompt, 3), prompt, 3)
        async for _ in other.dispatcher.generate(cluster.input(prompt, 3)):
            pass

    await both()
    redis.kill()
    await until(lambda: not cluster.core.shared.status().is_up)
    for _ in range(5):
        await both()
    health = await cluster.core.dispatcher.health()
    assert health.is_ready and health.detail["shared_state"]["is_up"] is False
    redis.start()
    await until(lambda: all(c.shared.status().num_copies == 2 for c in (cluster.core, other)))
    await until(lambda: cluster.core.shared.status().is_up)
    await both()
    await cluster.settled()


async def test_a_note_of_an_unknown_worker_is_ignored(start_two) -> None:
    cluster, other = await start_two()
    for worker in (None, WorkerId("nobody"), WorkerId("d0")):
        note = PlacementNote(b"x" * 17, worker, WorkerId("nobody"), 1, 2)
        cluster.core.shared.publish_placement(note)
    await heard(other, 1)
    async for _ in other.dispatcher.generate(cluster.input(list(range(50)), 1)):
        pass
