"""What the Ray actor does, without Ray."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.clock import ManualClock
from services.router.shared.ray_table import MAX_BATCHES, NO_KEYS_KNOWN, RayTable
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
    await table.beat(beat("one", "a"), NO_KEYS_KNOWN)
    clock.advance(10)
    assert not (await table.take(take("b"))).is_granted
    clock.advance(6)
    assert (await table.take(take("b"))).is_granted
    await table.refund([Refund("acme", LIMITS, slot="b")])
    assert (await table.take(take("c"))).is_granted


async def test_copies_that_fall_silent_no_longer_count() -> None:
    clock = ManualClock()
    table = RayTable(clock.now)
    assert (await table.beat(beat("one"), NO_KEYS_KNOWN)).num_copies == 1
    clock.advance(5)
    assert (await table.beat(beat("two"), NO_KEYS_KNOWN)).num_copies == 2
    clock.advance(5)
    assert (await table.beat(beat("two"), NO_KEYS_KNOWN)).num_copies == 1
    assert await table.leave("two") == 0


async def test_keys_go_to_copies_that_know_another_version() -> None:
    table = RayTable()
    first = (await table.beat(beat("one"), NO_KEYS_KNOWN)).keys
    assert first.states == {}
    assert (await table.beat(beat("one"), first.now)).keys.states is None
    written = await table.write_key("hash", TenantRecord("acme"))
    second = (await table.beat(beat("one"), first.now)).keys
    assert second.states == {"hash": written} and written.record == TenantRecord("acme")
    revoked = await table.revoke_key("hash")
    assert revoked is not None and await table.revoke_key("hash") is None
    assert await table.list_keys() == {} and await table.read_key("hash") is None
    third = await table.read_keys(second.now)
    assert third.states == {"hash": revoked} and third.now.version > second.now.version


async def test_a_table_without_memory_takes_keys_back_from_a_mirror() -> None:
    old = RayTable()
    for key in ("kept", "lost"):
        await old.write_key(key, TenantRecord("acme"))
    mirror = (await old.read_keys(NO_KEYS_KNOWN)).states
    assert mirror is not None
    table = RayTable()
    now = (await table.read_keys(NO_KEYS_KNOWN)).now
    await table.write_key("kept", TenantRecord("new"))
    await table.restore_keys("older", mirror)
    assert await table.read_key("lost") is None
    await table.restore_keys(now.generation, mirror)
    assert await table.list_keys() == {"kept": TenantRecord("new"), "lost": TenantRecord("acme")}


@pytest.mark.parametrize("is_behind_first", [True, False])
async def test_a_revoked_key_does_not_return_with_a_mirror_that_is_behind(
    is_behind_first: bool,
) -> None:
    old = RayTable()
    await old.write_key("hash", TenantRecord("acme"))
    behind = (await old.read_keys(NO_KEYS_KNOWN)).states
    await old.revoke_key("hash")
    ahead = (await old.read_keys(NO_KEYS_KNOWN)).states
    assert behind is not None and ahead is not None
    table = RayTable()
    generation = (await table.read_keys(NO_KEYS_KNOWN)).now.generation
    for mirror in (behind, ahead) if is_behind_first else (ahead, behind):
        await table.restore_keys(generation, mirror)
    assert await table.read_key("hash") is None
    # Given out again later, it counts.
    await table.write_key("hash", TenantRecord("acme"))
    await table.restore_keys(generation, ahead)
    assert await table.read_key("hash") == TenantRecord("acme")


async def test_change_of_keys_wakes_the_copies_at_once() -> None:
    table = RayTable()
    known = (await table.read_keys(NO_KEYS_KNOWN)).now
    cursor = (await table.batches(None, known, 0.0)).cursor
    for change in (table.write_key("hash", TenantRecord("acme")), table.revoke_key("hash")):
        waiting = asyncio.create_task(table.batches(cursor, known, 20.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        await change
        answer = await asyncio.wait_for(waiting, 5.0)
        assert answer.keys != known and answer.batches == ()
        known = answer.keys


async def test_every_copy_reads_all_batches_from_its_start() -> None:
    table = RayTable()
    known = (await table.read_keys(NO_KEYS_KNOWN)).now
    await table.publish(b"before")
    start = (await table.batches(None, known, 0.0)).cursor
    waiting = asyncio.create_task(table.batches(start, known, 20.0))
    await asyncio.sleep(0)
    await table.publish(b"one")
    answer = await waiting
    assert list(answer.batches) == [b"one"]
    await table.publish(b"two")
    await table.publish(b"three")
    assert list((await table.batches(answer.cursor, known, 0.0)).batches) == [b"two", b"three"]
    assert list((await table.batches(start, known, 0.0)).batches) == [b"one", b"two", b"three"]
    # A cursor of an earlier table.
    assert (await table.batches(99, known, 0.0)).batches == ()


async def test_batches_are_bounded() -> None:
    table = RayTable()
    known = (await table.read_keys(NO_KEYS_KNOWN)).now
    for i in range(MAX_BATCHES + 10):
        await table.publish(str(i).encode())
    assert (await table.batches(0, known, 0.0)).batches[0] == b"10"
    for _ in range(20):
        await table.publish(bytes(4 << 20))
    assert len((await table.batches(0, known, 0.0)).batches) <= 8
