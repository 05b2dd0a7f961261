"""What the Ray actor does, without Ray."""

from __future__ import annotations

import asyncio

from baton.core.clock import ManualClock
from services.router.shared.ray_table import MAX_BATCHES, RayTable
from services.router.shared.state import QuotaLimits, TenantRecord
from services.router.shared.store import Beat, HeldSlot, Refund, Take

LIMITS = QuotaLimits(max_concurrent=1)


def take(slot: str) -> Take:
    return Take("acme", LIMITS, 1, 10, slot, 15.0)


def beat(copy_id: str, *slots: str) -> Beat:
    return Beat(copy_id, 8.0, [HeldSlot("acme", slot) for slot in slots], 15.0)


async def test_slots_are_leases_that_signs_of_life_renew() -> None:
    clock = ManualClock()
    table = RayTable(clock.now)
    assert (await table.take(take("a"))).is_granted
    clock.advance(10)
    await table.beat(beat("one", "a"), "", -1)
    clock.advance(10)
    assert not (await table.take(take("b"))).is_granted
    clock.advance(6)
    assert (await table.take(take("b"))).is_granted
    await table.refund([Refund("acme", LIMITS, slot="b")])
    assert (await table.take(take("c"))).is_granted


async def test_copies_that_fall_silent_no_longer_count() -> None:
    clock = ManualClock()
    table = RayTable(clock.now)
    assert (await table.beat(beat("one"), "", -1)).num_copies == 1
    clock.advance(5)
    assert (await table.beat(beat("two"), "", -1)).num_copies == 2
    clock.advance(5)
    assert (await table.beat(beat("two"), "", -1)).num_copies == 1
    assert await table.leave("two") == 0


async def test_keys_go_to_copies_that_know_another_version() -> None:
    table = RayTable()
    first = await table.beat(beat("one"), "", -1)
    assert first.keys == {}
    assert (await table.beat(beat("one"), first.generation, first.version)).keys is None
    await table.write_key("hash", TenantRecord("acme"))
    second = await table.beat(beat("one"), first.generation, first.version)
    assert second.keys == {"hash": TenantRecord("acme")}
    assert await table.delete_key("hash") and not await table.delete_key("hash")
    third = await table.beat(beat("one"), second.generation, second.version)
    assert third.keys == {} and third.version > second.version


async def test_a_table_without_memory_takes_keys_back_from_a_mirror() -> None:
    table = RayTable()
    pulse = await table.beat(beat("one"), "older", 7)
    await table.write_key("kept", TenantRecord("new"))
    mirror = {"kept": TenantRecord("old"), "lost": TenantRecord("acme")}
    await table.restore_keys("older", mirror)
    assert await table.read_key("lost") is None
    await table.restore_keys(pulse.generation, mirror)
    assert await table.list_keys() == {"kept": TenantRecord("new"), "lost": TenantRecord("acme")}


async def test_every_copy_reads_all_batches_from_its_start() -> None:
    table = RayTable()
    await table.publish(b"before")
    start = (await table.batches(None, 0.0)).cursor
    waiting = asyncio.create_task(table.batches(start, 20.0))
    await asyncio.sleep(0)
    await table.publish(b"one")
    answer = await waiting
    assert list(answer.batches) == [b"one"]
    await table.publish(b"two")
    await table.publish(b"three")
    assert list((await table.batches(answer.cursor, 0.0)).batches) == [b"two", b"three"]
    assert list((await table.batches(start, 0.0)).batches) == [b"one", b"two", b"three"]
    # A cursor of an earlier table.
    assert (await table.batches(99, 0.0)).batches == ()


async def test_batches_are_bounded() -> None:
    table = RayTable()
    for i in range(MAX_BATCHES + 10):
        await table.publish(str(i).encode())
    assert (await table.batches(0, 0.0)).batches[0] == b"10"
    for _ in range(20):
        await table.publish(bytes(4 << 20))
    assert len((await table.batches(0, 0.0)).batches) <= 8
