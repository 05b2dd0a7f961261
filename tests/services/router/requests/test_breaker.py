"""Workers that fail requests rest; retries stay a share of the load."""

from __future__ import annotations

import random

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import WorkerId
from services.router.requests.breaker import MAX_OUTCOMES, Breakers, BreakerState
from services.router.requests.retry_budget import RetryBudget
from services.router.requests.retry_config import BreakerConfig, RetryConfig

W = WorkerId("w")
CONFIG = BreakerConfig(min_failures=3, failure_ratio=0.5, window_s=10, open_s=2, open_max_s=7)


def opened(at_s: float = 0.0) -> Breakers:
    breakers = Breakers(CONFIG)
    for _ in range(3):
        breakers.failed(W, at_s)
    assert breakers.state(W) is BreakerState.OPEN
    return breakers


def test_few_failures_do_not_open():
    breakers = Breakers(CONFIG)
    breakers.failed(W, 0)
    breakers.failed(W, 1)
    assert breakers.resting(1) == frozenset()


def test_failures_among_many_successes_do_not_open():
    breakers = Breakers(CONFIG)
    breakers.failed(W, 0)
    for _ in range(10):
        breakers.succeeded(W, 0)
    for _ in range(4):
        breakers.failed(W, 1)
    assert breakers.state(W) is BreakerState.CLOSED


def test_failures_long_apart_do_not_open():
    breakers = Breakers(CONFIG)
    for at_s in (0, 11, 22, 33, 44):
        breakers.failed(W, at_s)
    assert breakers.state(W) is BreakerState.CLOSED


def test_open_worker_rests_then_gets_one_trial():
    breakers = opened()
    assert breakers.resting(1.9) == {W}
    assert breakers.resting(2) == frozenset()
    breakers.placed(W, 2)
    assert breakers.state(W) is BreakerState.HALF_OPEN
    assert breakers.resting(2) == {W}, "a second request while the trial runs"


def test_trial_that_succeeds_closes_and_forgets():
    breakers = opened()
    breakers.placed(W, 2)
    breakers.succeeded(W, 2.5)
    assert breakers.state(W) is BreakerState.CLOSED
    assert len(breakers) == 0 and breakers.shut() == frozenset()


def test_trials_that_fail_rest_twice_as_long_up_to_the_limit():
    breakers, now_s, pauses = opened(), 0.0, []
    for _ in range(4):
        started_s = now_s
        while W in breakers.resting(now_s):
            now_s += 0.5
        pauses.append(now_s - started_s)
        breakers.placed(W, now_s)
        breakers.failed(W, now_s)
    assert pauses == [2, 4, 7, 7]


def test_trial_nobody_reports_is_followed_by_another():
    breakers = opened()
    breakers.placed(W, 2)
    assert breakers.resting(4) == frozenset()


def test_late_outcomes_of_requests_from_before_change_nothing_while_open():
    breakers = opened()
    breakers.succeeded(W, 0.5)
    breakers.failed(W, 0.5)
    assert breakers.resting(1.9) == {W} and breakers.resting(2) == frozenset()


def test_random_walk_keeps_its_promises():
    rng = random.Random(7)
    workers = [WorkerId(f"w{i}") for i in range(4)]
    breakers, now_s = Breakers(CONFIG), 0.0
    for _ in range(20_000):
        now_s += rng.random()
        worker_id = rng.choice(workers)
        resting = breakers.resting(now_s)
        assert resting <= breakers.shut()
        for other in workers:
            is_shut = breakers.state(other) is not BreakerState.CLOSED
            assert is_shut == (other in breakers.shut())
        match rng.randrange(4):
            case 0:
                breakers.failed(worker_id, now_s)
            case 1:
                breakers.succeeded(worker_id, now_s)
            case 2 if worker_id not in resting:
                was_shut = worker_id in breakers.shut()
                breakers.placed(worker_id, now_s)
                assert (worker_id in breakers.resting(now_s)) == was_shut
            case 3 if rng.random() < 0.05:
                breakers.forget(worker_id)
                assert breakers.state(worker_id) is BreakerState.CLOSED
    # Nobody rests for good.
    assert breakers.resting(now_s + CONFIG.open_max_s) == frozenset()


def test_memory_of_one_worker_is_bounded():
    breakers = Breakers(CONFIG)
    breakers.failed(W, 0)
    for _ in range(10 * MAX_OUTCOMES):
        breakers.succeeded(W, 0)
    assert len(breakers._breakers[W].outcomes) == MAX_OUTCOMES


def test_budget_lets_the_reserve_pass_then_a_share():
    budget = RetryBudget(RetryConfig(budget_ratio=0.1, budget_reserve=5))
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False]
    granted = 0
    for _ in range(1000):
        budget.pay_in()
        granted += budget.take()
    assert 95 <= granted <= 100


def test_budget_saves_no_more_than_the_reserve():
    budget = RetryBudget(RetryConfig(budget_ratio=1.0, budget_reserve=3))
    for _ in range(100):
        budget.pay_in()
    assert budget.num_left == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RetryConfig(budget_ratio=1.5), "got 1.5"),
        (lambda: RetryConfig(budget_reserve=0), "retry.budget_reserve"),
        (lambda: BreakerConfig(failure_ratio=0), "got 0"),
        (lambda: BreakerConfig(open_s=5, open_max_s=1), "at least breaker.open_s"),
    ],
)
def test_settings_out_of_range_are_named(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
