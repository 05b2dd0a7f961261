"""Several copies over a real local Ray: exact together, alive while the actor is not, healed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from baton.core.errors import Unavailable
from baton.core.worker_info import WorkerId
from baton.telemetry.metrics import Metrics
from services.router.shared.config import SharedConfig, SharedPlace
from services.router.shared.opening import open_shared
from services.router.shared.ray_store import NAMESPACE
from services.router.shared.state import (
    PlacementNote,
    QuotaLimits,
    SharedState,
    TenantRecord,
    hash_key,
)

DEADLINE_S = 60.0
NOTE = PlacementNote(bytes(32), WorkerId("p-0"), WorkerId("d-0"), 100, 228)
CONFIG = SharedConfig(
    place=SharedPlace.RAY, deployment="test", budget_s=5.0, copy_ttl_s=2.0, slot_ttl_s=3.0
)
StartCopy = Callable[[str], Awaitable[SharedState]]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            include_dashboard=False,
            object_store_memory=80 << 20,
            num_cpus=1,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    yield
    ray.shutdown()


@pytest.fixture
async def start_copy(ray: None) -> AsyncIterator[StartCopy]:
    copies: list[SharedState] = []

    async def start(name: str) -> SharedState:
        copy = open_shared(CONFIG, copy_id=name, metrics=Metrics())
        await copy.start()
        copies.append(copy)
        await until(lambda: copy.status().is_up)
        return copy

    yield start
    for copy in copies:
        await copy.stop()
    await until(lambda: actor() is None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.02)


def actor() -> object | None:
    import ray

    try:
        handle: object = ray.get_actor("shared-state-test", namespace=NAMESPACE)
    except ValueError:
        return None
    return handle


async def test_two_copies_grant_exactly_the_limit(start_copy: StartCopy) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    limits = QuotaLimits(max_concurrent=20)
    calls = [c.take_quota("a", limits=limits, num_tokens=1) for _ in range(20) for c in (one, two)]
    answers = await asyncio.gather(*calls)
    assert sum(answer.is_granted for answer in answers) == 20
    assert not any(answer.is_estimated for answer in answers)
    granted = next(answer.grant for answer in answers if answer.is_granted)
    for copy in (one, two):
        copy.return_quota(granted)
    async with asyncio.timeout(DEADLINE_S):
        while not (await two.take_quota("a", limits=limits, num_tokens=1)).is_granted:
            await asyncio.sleep(0.02)
    await until(lambda: one.status().num_copies == two.status().num_copies == 2)


async def test_placements_reach_the_other_copy(start_copy: StartCopy) -> None:
    one, two = await start_copy("one"), await start_copy("two")
    heard: list[PlacementNote] = []
    two.on_placement(heard.append)
    await until(lambda: one.status().num_copies == 2)
    async with asyncio.timeout(DEADLINE_S):
        while not heard:
            one.publish_placement(NOTE)
            await asyncio.sleep(0.05)
    assert heard[0] == NOTE


@pytest.mark.parametrize("is_restarted_by_ray", [True, False])
async def test_a_dead_actor_loses_nothing_that_matters(
    start_copy: StartCopy, is_restarted_by_ray: bool
) -> None:
    import ray

    one, two = await start_copy("one"), await start_copy("two")
    await until(lambda: one.status().num_copies == two.status().num_copies == 2)
    limits = QuotaLimits(max_concurrent=2)
    first = await one.take_quota("a", limits=limits, num_tokens=1)
    second = await two.take_quota("a", limits=limits, num_tokens=1)
    assert first.is_granted and second.is_granted
    await one.put_key(hash_key("k"), TenantRecord("acme"))
    assert await two.key_owner(hash_key("k")) == TenantRecord("acme")
    assert await two.key_owner(hash_key("other")) is None
    # Signs of life bring the keys to the copies' mirrors.
    await asyncio.sleep(1.0)

    ray.kill(actor(), no_restart=not is_restarted_by_ray)
    async with asyncio.timeout(DEADLINE_S):
        while not (await one.take_quota("b", limits=limits, num_tokens=1)).is_estimated:
            await asyncio.sleep(0.01)
    assert await two.key_owner(hash_key("k")) == TenantRecord("acme")

    await until(lambda: one.status().is_up and two.status().is_up)
    await until(lambda: one.status().num_copies == two.status().num_copies == 2)
    assert not (await two.take_quota("a", limits=limits, num_tokens=1)).is_granted
    assert await one.list_keys() == {hash_key("k"): TenantRecord("acme")}
    assert await one.remove_key(hash_key("k"))


async def test_a_key_revoked_as_the_actor_dies_does_not_return(start_copy: StartCopy) -> None:
    import ray

    one, two = await start_copy("one"), await start_copy("two")
    await one.put_key(hash_key("k"), TenantRecord("acme"))
    await one.put_key(hash_key("kept"), TenantRecord("acme"))
    # A sign of life has brought them to the other copy's mirror.
    await asyncio.sleep(1.0)
    assert await one.remove_key(hash_key("k"))
    ray.kill(actor(), no_restart=False)
    for copy in (two, one):
        with contextlib.suppress(Unavailable):
            await copy.list_keys()
    await until(lambda: one.status().is_up and two.status().is_up)
    # One sign of life of each.
    await asyncio.sleep(2.0)
    for copy in (one, two):
        assert await copy.list_keys() == {hash_key("kept"): TenantRecord("acme")}


async def test_without_the_actor_a_key_cannot_be_stored(start_copy: StartCopy) -> None:
    import ray

    one = await start_copy("one")
    ray.kill(actor(), no_restart=True)
    with pytest.raises(Unavailable):
        for _ in range(100):
            await one.put_key(hash_key("k"), TenantRecord("acme"))
    await until(lambda: one.status().is_up)
