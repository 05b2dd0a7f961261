"""The small parts of shared state that need no store."""

from __future__ import annotations

import dataclasses
import random

import pytest

from baton.core.clock import ManualClock
from baton.core.errors import ConfigError
from baton.core.worker_info import WorkerId
from services.router.shared import key_cache, outbox
from services.router.shared.circuit import MAX_TIMEOUTS, PROBE_MAX_S, StoreCircuit
from services.router.shared.config import SharedConfig, SharedPlace
from services.router.shared.held import HeldGrants
from services.router.shared.key_cache import KeyCache
from services.router.shared.outbox import NoteQueue, RefundQueue
from services.router.shared.process_state import ProcessState
from services.router.shared.state import (
    PlacementNote,
    QuotaGrant,
    QuotaKind,
    QuotaLimits,
    TenantRecord,
    hash_key,
)
from services.router.shared.store import Refund, Take
from services.router.shared.table import MAX_TENANTS, SharedTable
from services.router.shared.wire import (
    MAX_NOTE_BLOCKS,
    decode_batch,
    encode_batch,
    record_from_json,
    record_to_json,
)

NOTE = PlacementNote(bytes(range(64)), WorkerId("p-0"), WorkerId("d-ä"), 100, 228)


# State of one process.


async def test_one_process_is_exact_and_gives_back() -> None:
    clock = ManualClock()
    state = ProcessState(clock=clock)
    await state.start()
    limits = QuotaLimits(requests_per_minute=6, tokens_per_minute=100, max_concurrent=2)
    first = await state.take_quota("a", limits=limits, num_tokens=60)
    assert first.is_granted and not first.is_estimated
    assert (first.remaining_requests, first.remaining_tokens) == (5, 40)
    refused = await state.take_quota("a", limits=limits, num_tokens=60)
    assert refused.exceeded is QuotaKind.TOKENS
    assert refused.retry_after_s == pytest.approx(12.0)
    state.return_quota(first.grant, num_unused_tokens=50)
    state.return_quota(first.grant, num_unused_tokens=50)
    second = await state.take_quota("a", limits=limits, num_tokens=60)
    assert second.remaining_tokens == 30
    # More than was taken.
    state.return_quota(second.grant, num_unused_tokens=-20)
    assert (await state.take_quota("a", limits=limits, num_tokens=0)).remaining_tokens == 10
    clock.advance(60)
    assert (await state.take_quota("a", limits=limits, num_tokens=0)).remaining_tokens == 100
    state.return_quota(None)
    await state.stop()


async def test_copies_without_a_store_grant_their_share() -> None:
    state = ProcessState(num_copies=4, clock=ManualClock())
    limits = QuotaLimits(requests_per_minute=20)
    answers = [await state.take_quota("a", limits=limits, num_tokens=1) for _ in range(10)]
    assert [a.is_granted for a in answers] == [True] * 5 + [False] * 5
    assert all(a.is_estimated for a in answers)
    assert state.status().num_copies == 4


async def test_no_limits_cost_nothing() -> None:
    state = ProcessState()
    for _ in range(10):
        answer = await state.take_quota("a", limits=QuotaLimits(), num_tokens=10**9)
        assert answer.is_granted
        state.return_quota(answer.grant)


def test_tenants_in_a_table_are_bounded_and_swept() -> None:
    table = SharedTable()
    limits = QuotaLimits(requests_per_minute=60)
    for i in range(MAX_TENANTS + 10):
        table.take(Take(f"t{i}", limits, 1, 1, "s", 1.0), 0.0)
    assert table.num_tenants == MAX_TENANTS
    table.take(Take("last", limits, 1, 1, "s", 1.0), 1000.0)
    assert table.num_tenants == 1


# Limits and records.


@pytest.mark.parametrize("value", [0, -1, 10**13])
def test_limits_out_of_range_are_refused(value: int) -> None:
    for kind in QuotaKind:
        with pytest.raises(ConfigError, match=kind.value):
            QuotaLimits(**{kind.value: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a" * 129}, "tenant"),
        ({"tenant": "a\nb"}, "tenant"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"priority": 101}, "priority"),
        ({"slo_class": "x" * 200}, "slo_class"),
    ],
)
def test_records_out_of_range_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        dataclasses.replace(TenantRecord("a"), **change)


def test_records_survive_json() -> None:
    record = TenantRecord("größe", QuotaLimits(1, None, 3), 0.5, -7, "batch")
    assert record_from_json(record_to_json(record)) == record


def test_hashes_of_keys_differ_and_tell_nothing() -> None:
    assert hash_key("a") != hash_key("b") and len(hash_key("a")) == 64


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"url": "http://x"}, "must start with"),
        ({"url": "redis://:secret@"}, "no host"),
        ({"url": "redis://h:99999"}, "port"),
        ({"url": "redis://h/db"}, "database"),
        ({"url": "unix://"}, "socket"),
        ({"deployment": "a b"}, "deployment"),
        ({"place": SharedPlace.REDIS}, "shared.url"),
        ({"budget_s": 0}, "budget_s"),
        ({"slot_ttl_s": 1.0}, "slot_ttl_s"),
    ],
)
def test_wrong_settings_are_refused_without_showing_a_password(
    values: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        SharedConfig(**values)  # type: ignore[arg-type]
    assert "secret" not in str(raised.value)


def test_a_password_is_not_in_the_repr() -> None:
    assert "secret" not in repr(SharedConfig(url="rediss://u:secret@h:6379/1"))


# Notes on their way.


def test_a_batch_survives_the_wire() -> None:
    notes = [NOTE, PlacementNote(b"", None, WorkerId("d"), 0, 1 << 40)]
    sender, decoded = decode_batch(encode_batch("router-ä", notes))
    assert sender == "router-ä" and decoded[0] == NOTE
    assert decoded[1].prefill_worker is None and decoded[1].kv_tokens == (1 << 32) - 1


def test_worker_with_too_long_an_id_spoils_no_batch() -> None:
    long = dataclasses.replace(NOTE, decode_worker=WorkerId("d" * 300))
    assert decode_batch(encode_batch("r", [NOTE, long, NOTE])).notes == [NOTE, NOTE]


def test_long_prompts_are_told_in_part() -> None:
    long = dataclasses.replace(NOTE, hashes=bytes(16 * (MAX_NOTE_BLOCKS + 5)))
    (note,) = decode_batch(encode_batch("r", [long])).notes
    assert len(note.hashes) == 16 * MAX_NOTE_BLOCKS


def test_no_damaged_batch_does_more_than_raise_value_error() -> None:
    rng = random.Random(2)
    good = encode_batch("router", [NOTE] * 3)
    num_refused = 0
    for _ in range(5000):
        data = bytearray(good[: rng.randrange(len(good) + 1)])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            decode_batch(bytes(data))
        except ValueError:
            num_refused += 1
    assert num_refused > 2500


def test_full_queues_drop_their_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_NOTES", 5)
    notes = NoteQueue()
    assert [notes.add(NOTE) for _ in range(7)] == [0, 0, 0, 0, 0, 1, 1]
    assert len(notes) == 5 and notes.clear() == 5
    refunds = RefundQueue()
    for i in range(outbox.MAX_REFUNDS + 3):
        refunds.add(Refund("a", QuotaLimits(), slot=f"{i}"))
    assert refunds.next_batch()[0].slot == "3"
    assert len(refunds) == outbox.MAX_REFUNDS - outbox.REFUNDS_PER_CALL


def test_a_message_is_bounded_by_bytes() -> None:
    notes = NoteQueue()
    for _ in range(400):
        notes.add(dataclasses.replace(NOTE, hashes=bytes(16 * MAX_NOTE_BLOCKS)))
    sizes = []
    while batch := notes.next_batch():
        sizes.append(len(encode_batch("r", batch)))
    assert len(sizes) > 1 and max(sizes) < 2 << 20


# Circuit, keys, grants.


def test_circuit_opens_after_a_few_timeouts_in_a_row_or_one_failure() -> None:
    circuit = StoreCircuit(0.0)
    circuit.close(1.0)
    assert [circuit.timed_out("late", 2.0) for _ in range(MAX_TIMEOUTS - 1)] == [False, False]
    circuit.succeeded()
    assert [circuit.timed_out("late", 3.0) for _ in range(MAX_TIMEOUTS)] == [False, False, True]
    assert not circuit.is_closed and circuit.since_s == 3.0 and circuit.reason == "late"
    pauses = [circuit.next_probe_pause_s() for _ in range(10)]
    assert pauses == sorted(pauses) and pauses[0] < 0.2 and pauses[-1] == PROBE_MAX_S
    circuit.close(9.0)
    assert circuit.next_probe_pause_s() == pauses[0]
    assert circuit.failed("refused", 10.0) and not circuit.failed("refused", 11.0)


def test_guessed_keys_push_out_no_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "MAX_UNKNOWN", 3)
    cache = KeyCache(2)
    cache.put("real", TenantRecord("a"), 0.0)
    for i in range(50):
        cache.put(f"guess-{i}", None, 0.0)
    real = cache.get("real", max_age_s=1.0, now_s=1.0)
    assert real is not None and real.record == TenantRecord("a")
    assert cache.get("real", max_age_s=1.0, now_s=1.1) is None
    assert cache.get("guess-0", max_age_s=9.0, now_s=0.0) is None
    guess = cache.get("guess-49", max_age_s=9.0, now_s=0.0)
    assert guess is not None and guess.record is None
    cache.put("real", None, 2.0)
    assert cache.get("real", max_age_s=9.0, now_s=2.0) == (None, 2.0)


def test_held_grants_random_walk() -> None:
    rng = random.Random(4)
    held = HeldGrants()
    model: dict[str, QuotaGrant] = {}
    for step in range(10_000):
        if rng.random() < 0.5:
            limits = QuotaLimits(10, None, rng.choice([None, 3]))
            grant = QuotaGrant(rng.choice("abc"), f"{step}", 5, limits)
            held.add(grant, is_estimated=rng.random() < 0.5)
            model[grant.slot] = grant
        else:
            slot = rng.choice([*model, "unknown"]) if len(model) < 20 else next(iter(model))
            removed = held.remove(slot)
            assert (None if removed is None else removed.grant) == model.pop(slot, None)
        assert len(held) == len(model)
        for tenant in "abc":
            assert held.count(tenant) == sum(g.tenant == tenant for g in model.values())
    limited = {s for s, g in model.items() if g.limits.max_concurrent}
    assert {h.slot for h in held.limited_slots()} == limited
    assert {r.slot for r in held.clear()} == limited and len(held) == 0
