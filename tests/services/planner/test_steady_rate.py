"""Rates of few arrivals: steady through noise, at once through a change."""

from __future__ import annotations

import math
import random

import pytest

from services.planner.steady_rate import ENOUGH, Interval, steady_rate


def drawn(rng: random.Random, rate_per_s: float, length_s: float) -> Interval:
    """Poisson arrivals."""
    at_s, num = rng.expovariate(rate_per_s), 0
    while at_s < length_s:
        num += 1
        at_s += rng.expovariate(rate_per_s)
    return Interval(length_s, num)


@pytest.mark.parametrize(("rate_per_s", "length_s"), [(0.5, 5.0), (1.0, 2.0), (4.0, 1.0)])
def test_noise_of_few_arrivals_is_taken_out(rate_per_s: float, length_s: float) -> None:
    rng = random.Random(7)
    num = round(60 / length_s)
    intervals = [drawn(rng, rate_per_s, length_s) for _ in range(1000)]
    raw = [i.num / i.length_s for i in intervals[num:]]
    steady = [steady_rate(intervals[k - num : k]) for k in range(num, len(intervals))]

    def error(rates: list[float]) -> float:
        return math.sqrt(sum((rate - rate_per_s) ** 2 for rate in rates) / len(rates))

    assert error(steady) < error(raw) / 2
    assert max(raw) > 2.5 * rate_per_s
    assert sorted(steady)[int(0.98 * len(steady))] < 1.8 * rate_per_s


@pytest.mark.parametrize(("before", "after"), [(2, 10), (1, 8), (8, 2), (10, 40), (40, 10)])
def test_a_change_stands_alone_from_its_first_interval_on(before: float, after: float) -> None:
    quiet = [Interval(5.0, before)] * 11
    for num in (1, 2, 3):
        changed = [*quiet[num:], *[Interval(5.0, after)] * num]
        if num == 1 and after == 2:
            # That fewer come is certain only a moment later.
            continue
        assert steady_rate(changed) == pytest.approx(after / 5)


def test_many_arrivals_need_no_others() -> None:
    assert steady_rate([Interval(5.0, 97.0), Interval(5.0, ENOUGH)]) == ENOUGH / 5


def test_nothing_and_no_time_are_no_rate() -> None:
    assert steady_rate([]) == 0.0
    assert steady_rate([Interval(0.0, 0.0)]) == 0.0
    assert steady_rate([Interval(5.0, 0.0), Interval(0.0, 0.0)]) == 0.0
    assert steady_rate([Interval(5.0, 0.0)] * 11 + [Interval(5.0, 1.0)]) == pytest.approx(1 / 60)


def test_random_intervals_give_a_rate_between_the_lowest_and_the_highest() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        intervals = [
            Interval(rng.choice([0.1, 1.0, 5.0]), rng.choice([0, 1, 2, 50, rng.random() * 500]))
            for _ in range(rng.randrange(1, 30))
        ]
        rates = [i.num / i.length_s for i in intervals]
        assert min(rates) - 1e-9 <= steady_rate(intervals) <= max(rates) + 1e-9
