"""Samples of the charts."""

from __future__ import annotations

import pytest

from services.router.pool_stats import PoolStats
from services.router.ui.history import PERIOD_S, History
from services.router.ui.request_book import EndedRequest


def test_sums_become_rates_and_shares_of_one_period():
    history = History(60)
    history.look(PoolStats(10.0, num_arrived=5, ttft_met=1, ttft_measured=2), [], 100.0)
    ended = [EndedRequest(t, None if t == 0.3 else 0.01) for t in (0.3, 0.1, 0.2)]
    now = PoolStats(
        12.0, num_arrived=9, output_tokens=50, ttft_met=4, ttft_measured=6, num_judged=6, num_kept=3
    )
    history.look(now, ended, 102.0)
    (sample,) = history.since(0)
    assert (sample.arrived_per_s, sample.tokens_per_s, sample.kept_per_s) == (2.0, 25.0, 1.5)
    assert sample.ttft_attainment == pytest.approx(0.75) and sample.itl_attainment is None
    assert (sample.ttft_p50_s, sample.ttft_p90_s, sample.itl_p50_s) == (0.2, 0.3, 0.01)


def test_without_targets_there_is_no_goodput():
    history = History(60)
    for i in range(3):
        history.look(PoolStats(10.0 + i), [], i)
    assert [s.kept_per_s for s in history.since(0)] == [None, None]


def test_history_is_bounded_and_is_read_in_parts():
    history = History(4 * PERIOD_S)
    for i in range(10):
        history.look(PoolStats(2.0 * i), [], 2.0 * i)
    assert [s.number for s in history.since(0)] == [6, 7, 8, 9]
    assert [s.number for s in history.since(8)] == [9]
    assert history.since(9) == []
    # A reader that remembers another router's numbers gets all.
    assert len(history.since(500)) == 4


def test_a_look_is_due_once_a_period_and_when_the_clock_was_set():
    history = History(60)
    assert history.is_due(5.0)
    history.look(PoolStats(1.0), [], 5.0)
    assert not history.is_due(5.0 + PERIOD_S / 2)
    assert history.is_due(5.0 + PERIOD_S) and history.is_due(4.0)
