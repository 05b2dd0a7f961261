"""A router process does not look through what it has started with again and again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc

import pytest

from baton.core.errors import BatonError
from services.router.admission.slo import SloTargets
from services.router.collection import YOUNG_OBJECTS, keep_from_collection
from services.router.requests.flight import Flight

LONG = list(range(1, 101))


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def num_flights():
    return sum(type(o) is Flight for o in gc.get_objects())


async def run(cluster, **fields):
    request = dataclasses.replace(cluster.input(LONG, 40), **fields)
    async for _ in cluster.core.dispatcher.generate(request):
        pass


async def leave(cluster):
    stream = cluster.core.dispatcher.generate(cluster.input(LONG, 400))
    await anext(stream)
    await stream.aclose()


async def be_late(cluster):
    with contextlib.suppress(BatonError):
        await run(cluster, deadline_s=0.02)


async def be_refused(cluster):
    for worker in cluster.workers.values():
        worker.set_load(queued_prefill_tokens=10**8)
    await asyncio.sleep(0.1)
    with contextlib.suppress(BatonError):
        await run(cluster, targets=SloTargets(ttft_s=0.5))


@pytest.mark.parametrize("ask", [run, leave, be_late, be_refused])
async def test_what_a_request_held_goes_with_it(cluster, without_collector, ask):
    num_before = num_flights()
    for _ in range(10):
        await ask(cluster)
    await cluster.settled()
    # The watchdog and the loop may still name the last one they have looked at.
    assert num_flights() <= num_before + 2


def test_what_lives_at_the_start_is_kept_from_collection() -> None:
    before = gc.get_threshold()
    try:
        keep_from_collection()
        assert gc.get_freeze_count() > 10_000 and gc.get_threshold()[0] == YOUNG_OBJECTS
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
