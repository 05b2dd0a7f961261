from __future__ import annotations

import random

import numpy as np

from baton.core.worker_info import Role, WorkerId
from services.router.placement.online_fit import RatioBook
from services.router.placement.perf_model import PerfModel
from services.router.placement.speeds import SpeedBook

IDS = [WorkerId(f"{role}{i}") for role in "pd" for i in range(5)]
BLOCK_SIZE = 16


def learn(perf, rng, num):
    for _ in range(num):
        worker_id, uncached = rng.choice(IDS), rng.randrange(10, 9000)
        role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
        perf.observe_prefill(role, worker_id, uncached, 0, uncached * rng.uniform(1e-5, 1e-3))
        perf.observe_queue(role, worker_id, 3000, rng.uniform(0.01, 1))
        perf.observe_itl(role, worker_id, rng.randrange(1, 60), 90_000, rng.uniform(0.005, 0.1))


def assert_equal(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert np.array_equal(mine, theirs)


def test_rows_are_those_of_the_model():
    perf = PerfModel()
    learn(perf, random.Random(1), 50)
    speeds = SpeedBook(IDS, 5, BLOCK_SIZE).speeds(perf)
    for i, worker_id in enumerate(IDS):
        role = Role.PREFILL if i < 5 else Role.DECODE
        prefill = perf.prefill_speed(role, worker_id)
        decode = perf.decode_speed(role, worker_id)
        half_pair_s = prefill.pair_s / 2
        np.testing.assert_allclose(
            speeds.prompt[:, i], (prefill.fixed_s, prefill.token_s, half_pair_s)
        )
        np.testing.assert_allclose(speeds.step[:, i], decode)
        np.testing.assert_allclose(
            speeds.load[:, i],
            (prefill.queued_token_s, decode.sequence_s, decode.kv_token_s, decode.kv_token_s),
        )
        np.testing.assert_allclose(
            speeds.saved_s_of(i, 7.0),
            prefill.token_s * 7 * BLOCK_SIZE + half_pair_s * (7 * BLOCK_SIZE) ** 2,
        )
        assert speeds.saved_s(np.full(10, 7.0))[i] == speeds.saved_s_of(i, 7.0)


def test_what_is_followed_step_by_step_equals_what_is_read_at_once():
    """However much has been learned in between, more than is remembered included."""
    perf, rng = PerfModel(), random.Random(2)
    book = SpeedBook(IDS, 5, BLOCK_SIZE)
    for _ in range(200):
        learn(perf, rng, rng.choice((0, 1, 3, 40)))
        version = perf.version
        speeds = book.speeds(perf)
        assert book.speeds(perf) is speeds and perf.version == version
        if rng.random() < 0.3:
            # Ratios count from the next change of the coefficients on, here as there.
            while perf.version == version:
                learn(perf, rng, 1)
            assert_equal(book.speeds(perf), SpeedBook(IDS, 5, BLOCK_SIZE).speeds(perf))


def test_changed_ratios_are_named_until_they_are_too_many():
    book = RatioBook()
    assert book.changed_since(0) == [] and book.changed_since(-1) is None
    for name in "abc":
        book.observe(name, 2.0, 1.0)
    assert book.changed_since(3) == [] and sorted(book.changed_since(1)) == ["b", "c"]
    for _ in range(RatioBook.RECENT):
        book.observe("d", 2.0, 1.0)
    assert book.changed_since(3) is not None and book.changed_since(2) is None


def test_ratio_that_is_forgotten_counts_as_changed(monkeypatch):
    monkeypatch.setattr(RatioBook, "MAX_WORKERS", 2)
    book = RatioBook()
    for name in "abc":
        book.observe(name, 2.0, 1.0)
    assert book.get("a") == 1.0 and "a" in book.changed_since(2)
