"""Sequences that will have left the decode batches."""

from __future__ import annotations

import random

from baton.core.worker_info import WorkerId
from services.router.admission.decode_forecast import DecodeForecast, Ending

D0, D1 = WorkerId("d0"), WorkerId("d1")


def test_counts_what_ends_in_the_time_and_not_what_is_overdue():
    forecast = DecodeForecast()
    for ends_at_s in (1.0, 2.0, 3.0, 4.0):
        forecast.add(D0, ends_at_s=ends_at_s, kv_tokens=100)
    forecast.add(D1, ends_at_s=2.5, kv_tokens=7)
    assert forecast.ending(D0, 1.5, 3.0) == Ending(2, 200)
    assert forecast.ending(D1, 1.5, 3.0) == Ending(1, 7)
    assert forecast.ending(D0, 9.0, 10.0) == Ending(0, 0)
    assert forecast.ending(WorkerId("unknown"), 0.0, 9.0) == Ending(0, 0)


def test_equal_ends_are_told_apart_and_nothing_is_left():
    rng, forecast = random.Random(1), DecodeForecast()
    added = [
        (w, forecast.add(w, ends_at_s=rng.randrange(5), kv_tokens=1))
        for w in (D0, D1)
        for _ in range(200)
    ]
    rng.shuffle(added)
    for count, (worker_id, running) in enumerate(added):
        assert len(forecast) == len(added) - count
        forecast.remove(worker_id, running)
    assert not len(forecast)
