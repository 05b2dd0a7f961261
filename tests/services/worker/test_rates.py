"""Rates as requests have seen them."""

import pytest

from baton.core.lifecycle import LifecycleEvent, Timeline
from services.worker.rates import MIN_PROMPT_TOKENS, MeanRate, PrefillRate


def timeline(seconds):
    return Timeline(
        {LifecycleEvent.PREFILL_STARTED: 10.0, LifecycleEvent.PREFILL_ENDED: 10.0 + seconds}
    )


def test_nothing_is_known_before_a_sample():
    assert MeanRate().per_second is None and MeanRate().seconds_each is None
    assert PrefillRate().seconds_per_token is None


def test_mean_forgets_old_samples():
    rate = MeanRate()
    for _ in range(20):
        rate.count(100, 1.0)
    for _ in range(20):
        rate.count(100, 4.0)
    assert rate.per_second == pytest.approx(25, rel=0.05)
    assert rate.seconds_each == pytest.approx(0.04, rel=0.05)


def test_samples_weigh_by_their_size():
    rate = MeanRate()
    rate.count(1, 1.0)
    rate.count(1000, 1.0)
    assert rate.per_second == pytest.approx(556, rel=0.01)


def test_samples_without_amount_or_time_do_not_count():
    rate = MeanRate()
    rate.count(0, 1.0)
    rate.count(1, 0.0)
    assert rate.per_second is None


def test_prompts_count_and_short_or_unfinished_ones_do_not():
    rate = PrefillRate()
    rate.count(MIN_PROMPT_TOKENS - 1, timeline(1.0))
    rate.count(1000, Timeline({LifecycleEvent.PREFILL_STARTED: 1.0}))
    assert rate.seconds_per_token is None
    rate.count(1000, timeline(2.0))
    assert rate.seconds_per_token == pytest.approx(0.002)
