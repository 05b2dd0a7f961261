"""Promises to those who wait: how many events to allow for, and what that takes."""

from __future__ import annotations

import random

import pytest

from services.router.admission.confidence import IN_DOUBT, SURE, events_allowed_for
from services.router.admission.pace import Pace, Turn


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize(("confidence", "share"), [(SURE, 0.99), (IN_DOUBT, 0.25)])
def test_events_have_come_in_the_share_of_cases_that_is_asked_for(count, confidence, share):
    rng = random.Random(1)
    within = events_allowed_for(count, confidence)
    trials = 4000
    in_time = sum(sum(rng.expovariate(1.0) for _ in range(count)) <= within for _ in range(trials))
    assert in_time / trials == pytest.approx(share, abs=0.02)


def test_nothing_to_wait_for_takes_no_time():
    assert events_allowed_for(0, SURE) == 0.0


def paced(places_per_s: float, *, num_over: int, num_decoding: int = 2) -> Pace:
    pace = Pace(max_retry_after_s=60.0)
    pace.expect(
        prompts_per_s=10.0,
        places_per_s=places_per_s,
        num_decoding=num_decoding,
        cost_tokens=100.0,
    )
    pace.held_up(num_over, 0.0, has_backlog=True)
    return pace


def test_the_fewer_places_it_takes_the_more_reserve_each_needs():
    pace = paced(10.0, num_over=1)
    each_s = [pace.surely_within_s(Turn(100.0 * n, n), 0.0) / n for n in (1, 2, 5, 50)]
    assert each_s == sorted(each_s, reverse=True)
    assert each_s[0] == pytest.approx(0.46, rel=0.05) and each_s[-1] == pytest.approx(0.14, rel=0.1)


def test_promise_and_giving_up_lie_far_apart():
    """Or a small change of the estimate would send away whom it has just let wait."""
    pace = paced(10.0, num_over=1)
    for n in (1, 3, 10, 40):
        turn = Turn(100.0 * n, n)
        promised_s = pace.surely_within_s(turn, 0.0)
        assert not pace.is_hopeless(turn, promised_s / 1.3, 0.0)
        assert pace.is_hopeless(turn, 0.25 * n / 10, 0.0)


def test_places_that_the_next_one_needs_count_for_all_after_it():
    turn = Turn(100.0, 1.0)
    one, five = (paced(10.0, num_over=n).surely_within_s(turn, 0.0) for n in (1, 5))
    assert five > 3 * one


def test_behind_prompts_it_is_the_work_that_counts():
    pace = paced(10.0, num_over=0)
    assert not pace.is_for_places
    assert pace.surely_within_s(Turn(1000.0, 3.0), 0.0) == pytest.approx(2.0)
    assert pace.surely_within_s(Turn(1000.0, 9.0), 0.0) == pytest.approx(2.0)


def test_while_nothing_is_known_of_places_nobody_is_sent_away_for_it():
    pace, turn = paced(0.0, num_over=1), Turn(100.0, 1.0)
    assert pace.surely_within_s(turn, 0.0) == 0.0
    assert not pace.is_hopeless(turn, 0.01, 0.0)
