"""A seeded soak in virtual time: workers hand over, fetch, take over, break and come back.

Each worker is a real engine with tiny pools, a real lease owner and a real fetcher; see
`soak_worker`. After every operation all accounts must agree. Every client must get the tokens of an
undisturbed run, each exactly once, and in the end nothing may be left anywhere.
"""

from __future__ import annotations

import random

import pytest

from soak_world import World

NUM_OPERATIONS = 12_000
ENOUGH = {
    "finished": 60,
    "prompt arrived": 30,
    "prefix arrived": 8,
    "takeover arrived": 8,
    "resumes": 20,
    "late writes": 8,
    "restarts": 5,
    "broken streams": 20,
    "cancelled": 20,
}
"""What a walk must have met, or it has shown nothing."""


async def soak(seed: int, num_operations: int, num_workers: int = 3) -> World:
    world = World(random.Random(seed), num_workers)
    await world.start()
    for number in range(num_operations):
        await world.act()
        world.check()
        if number % 4 == 0:
            world.check_contents()
    await world.drain()
    world.check()
    world.check_contents()
    world.check_nothing_leaked()
    for worker in world.workers.values():
        await worker.fetcher.close()
    return world


@pytest.mark.parametrize("seed", [1, 2])
async def test_soak_of_three_workers_loses_and_repeats_nothing(seed):
    world = await soak(seed, NUM_OPERATIONS)
    assert world.events["writes into blocks in use"] == 0
    missing = {name: world.events[name] for name, n in ENOUGH.items() if world.events[name] < n}
    assert not missing, world.events


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [3, 4, 5])
@pytest.mark.parametrize("seed", range(3, 15))
async def test_soak_of_many_seeds(seed, num_workers):
    world = await soak(seed, NUM_OPERATIONS, num_workers)
    assert world.events["writes into blocks in use"] == 0
