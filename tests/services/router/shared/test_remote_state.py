"""One copy over a store that answers late or not at all: nothing stays held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import pytest

from baton.telemetry.metrics import Metrics
from services.router.shared.config import SharedConfig
from services.router.shared.ledger import LedgerAnswer
from services.router.shared.remote_state import RemoteState
from services.router.shared.state import QuotaLimits, SharedBackend, TenantRecord
from services.router.shared.store import Beat, Refund, Take
from services.router.shared.table import SharedTable
from services.router.shared.telemetry import SharedTelemetry

DEADLINE_S = 10.0
ONE_AT_A_TIME = QuotaLimits(max_concurrent=1)


class LateStore:
    """Does at once what it is told, and says so late."""

    def __init__(self) -> None:
        self.table = SharedTable()
        self.delay_s = 0.0
        self.held: set[str] = set()
        """Slots of the last sign of life."""

    def has_room(self) -> bool:
        """Whether somebody else would get the only slot."""
        take = Take("acme", ONE_AT_A_TIME, 1, 1, "probe", 60.0)
        answer = self.table.take(take, time.monotonic())
        if answer.is_granted:
            self.table.refund([Refund("acme", ONE_AT_A_TIME, slot="probe")], time.monotonic())
        return answer.is_granted

    async def take(self, take: Take) -> LedgerAnswer:
        answer = self.table.take(take, time.monotonic())
        await asyncio.sleep(self.delay_s)
        return answer

    async def refund(self, refunds: Sequence[Refund]) -> None:
        self.table.refund(refunds, time.monotonic())

    async def beat(self, beat: Beat) -> int:
        self.held = {held.slot for held in beat.slots}
        return self.table.beat(beat, time.monotonic())

    async def leave(self, copy_id: str) -> None:
        self.table.leave(copy_id, time.monotonic())

    async def read_key(self, key_hash: str) -> TenantRecord | None:
        return self.table.read_key(key_hash)

    async def write_key(self, key_hash: str, record: TenantRecord) -> None:
        self.table.write_key(key_hash, record)

    async def delete_key(self, key_hash: str) -> bool:
        return self.table.delete_key(key_hash)

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        return self.table.list_keys()

    async def publish(self, batch: bytes) -> None:
        pass

    async def batches(self) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def close(self) -> None:
        pass


@pytest.fixture
def store() -> LateStore:
    return LateStore()


@pytest.fixture
async def state(store: LateStore) -> AsyncIterator[RemoteState]:
    state = RemoteState(
        store,
        backend=SharedBackend.REDIS,
        copy_id="one",
        config=SharedConfig(budget_s=0.05, copy_ttl_s=0.4, slot_ttl_s=60.0),
        telemetry=SharedTelemetry(Metrics(), SharedBackend.REDIS),
    )
    await state.start()
    yield state
    await state.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_slot_of_a_request_that_was_let_in_by_estimate_is_free_after_it(state, store):
    store.delay_s = 30.0
    answer = await state.take_quota("acme", limits=ONE_AT_A_TIME, num_tokens=1)
    assert answer.is_granted and answer.is_estimated and state.status().is_up
    # The next sign of life tells the store of it, since it runs.
    await until(lambda: bool(store.held))
    assert not store.has_room()
    state.return_quota(answer.grant)
    await until(store.has_room)


async def test_question_that_nobody_waits_for_any_more_takes_nothing(state, store):
    store.delay_s = 30.0
    question = asyncio.create_task(state.take_quota("acme", limits=ONE_AT_A_TIME, num_tokens=1))
    await until(lambda: not store.has_room())
    question.cancel()
    await asyncio.gather(question, return_exceptions=True)
    await until(store.has_room)


async def test_stopping_gives_back_what_is_held(state, store):
    assert (await state.take_quota("acme", limits=ONE_AT_A_TIME, num_tokens=1)).is_granted
    assert not store.has_room()
    await state.stop()
    assert store.has_room()
