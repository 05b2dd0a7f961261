"""Rates to come: constant, rising, daily, in bursts."""

from __future__ import annotations

import math
import random

import pytest

from services.planner.forecast import ArrivalForecast


def fed(
    rates: list[float], *, gap_s: float = 10.0, season_s: float = 86_400.0, burst: float = 0.0
) -> ArrivalForecast:
    forecast = ArrivalForecast(window_s=300, burst_share=burst, season_s=season_s)
    for i, rate in enumerate(rates):
        forecast.observe(i * gap_s, rate)
    return forecast


def test_a_constant_rate_is_itself() -> None:
    assert fed([7.0] * 100).at(1500).rate_per_s == pytest.approx(7.0)


def test_a_rising_rate_is_seen_to_rise_and_not_for_ever() -> None:
    rates = [10 + 0.1 * i for i in range(200)]
    forecast = fed(rates)
    assert forecast.at(2050).rate_per_s == pytest.approx(30.4, rel=0.08)
    assert forecast.at(1e6).rate_per_s <= 2 * forecast.at(1990).level + 1e-9


def test_the_same_time_of_earlier_days_is_remembered() -> None:
    def rate(at_s: float) -> float:
        return 10 + 8 * math.sin(2 * math.pi * at_s / 3600)

    forecast = fed([rate(10 * i) for i in range(1080)], season_s=3600)
    now_s = 10 * 1079
    for ahead_s in (300, 600, 900):
        assert forecast.at(now_s + ahead_s).rate_per_s == pytest.approx(
            rate(now_s + ahead_s), rel=0.25
        )


def test_a_time_of_day_with_next_to_nothing_in_it_multiplies_by_ten_at_most() -> None:
    # Quiet but for one hour; now, just before it, there is far more than on the day before.
    day = [0.001] * 180 + [50.0] * 180
    forecast = fed([*day, *[0.001] * 175, *[5.0] * 4], season_s=3600)
    now_s = 10 * (len(day) + 178)
    told = forecast.at(now_s + 120)
    assert told.season <= 10
    assert told.rate_per_s < 60


def test_a_burst_leaves_a_floor_for_as_long_as_the_window() -> None:
    rates = [2.0] * 50 + [40.0] * 3 + [2.0] * 60
    forecast = fed(rates[:70], burst=0.5)
    assert forecast.at(700).rate_per_s == pytest.approx(20.0)
    assert fed(rates, burst=0.5).at(1130).rate_per_s < 5


def test_a_slope_is_not_carried_over_a_time_in_which_nobody_looked() -> None:
    forecast = fed([1.0] * 50 + [2.0 + 4 * i for i in range(10)])
    forecast.observe(590 + 3600, 1.0)
    assert forecast.at(590 + 3600).rate_per_s < 3


def test_nothing_seen_is_nothing_expected_and_time_goes_forward() -> None:
    forecast = ArrivalForecast(window_s=10, burst_share=0.5)
    assert forecast.at(5).rate_per_s == 0
    forecast.observe(5, 1.0)
    with pytest.raises(ValueError, match="back"):
        forecast.observe(4, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_random_rates_never_give_a_negative_or_endless_forecast(seed: int) -> None:
    rng = random.Random(seed)
    forecast, now_s, highest = ArrivalForecast(window_s=60, burst_share=0.5), 0.0, 0.0
    for _ in range(2000):
        now_s += rng.choice([0.0, 0.1, 5, 60, 4000])
        rate = rng.choice([0.0, rng.random(), 100 * rng.random(), 1e4])
        highest = max(highest, rate)
        forecast.observe(now_s, rate)
        told = forecast.at(now_s + rng.random() * 1000).rate_per_s
        assert math.isfinite(told)
        assert told >= 0
