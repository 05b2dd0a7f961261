from __future__ import annotations

import math
import random

import pytest

from services.router.placement.online_fit import MIN_SHARE, OnlineFit, RatioBook

ASSUMED = (0.005, 50e-6, 1.5e-9)


def fit():
    return OnlineFit(ASSUMED, memory=500, outlier_ratio=0.5)


def prompts(rng, num):
    for _ in range(num):
        n = int(10 ** rng.uniform(1.0, 4.3))
        yield (1.0, float(n), n * n / 2)


def cost(coefficients, x):
    return sum(c * v for c, v in zip(coefficients, x, strict=True))


def mean_error(learned, truth, rng):
    errors = [abs(learned.predict(x) / cost(truth, x) - 1) for x in prompts(rng, 300)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    "truth", [(0.02, 400e-6, 3e-9), (0.001, 8e-6, 4e-10), (0.005, 50e-6, 1.5e-9), (1.0, 1e-3, 1e-7)]
)
def test_other_machines_are_recognised_and_learned(truth):
    rng, learned = random.Random(1), fit()
    for x in prompts(rng, 20):
        learned.observe(x, cost(truth, x) * rng.lognormvariate(0, 0.1))
    assert mean_error(learned, truth, rng) < 0.5
    for x in prompts(rng, 800):
        learned.observe(x, cost(truth, x) * rng.lognormvariate(0, 0.1))
    assert mean_error(learned, truth, rng) < 0.1
    assert learned.error_ratio < 0.2


def test_outliers_have_a_bounded_say():
    rng, learned, truth = random.Random(2), fit(), (0.01, 200e-6, 3e-9)
    for x in prompts(rng, 1000):
        outlier = rng.choice((0.001, 50.0)) if rng.random() < 0.08 else 1.0
        learned.observe(x, cost(truth, x) * rng.lognormvariate(0, 0.1) * outlier)
    assert mean_error(learned, truth, rng) < 0.25


def test_outlier_as_the_first_measurement_is_forgotten():
    rng, learned, truth = random.Random(2), fit(), (0.01, 200e-6, 3e-9)
    learned.observe((1.0, 100.0, 5000.0), 60.0)
    for x in prompts(rng, 100):
        learned.observe(x, cost(truth, x))
    assert mean_error(learned, truth, rng) < 0.15


def test_changed_machine_is_followed():
    rng, learned = random.Random(3), fit()
    for truth in (ASSUMED, tuple(3 * c for c in ASSUMED)):
        for x in prompts(rng, 2000):
            learned.observe(x, cost(truth, x) * rng.lognormvariate(0, 0.1))
    assert mean_error(learned, truth, rng) < 0.1


def test_slope_nothing_is_known_of_keeps_its_proportion():
    """All prompts of one length: what they cost is learned, and longer ones are guessed from it."""
    learned = fit()
    for _ in range(500):
        learned.observe((1.0, 1000.0, 500_000.0), 10 * cost(ASSUMED, (1.0, 1000.0, 500_000.0)))
    long = (1.0, 4000.0, 8e6)
    assert 4 < learned.predict(long) / cost(ASSUMED, long) < 20


def test_nothing_is_ever_for_free_or_negative():
    rng, learned = random.Random(5), fit()
    for _ in range(3000):
        x = (1.0, float(rng.randrange(1, 9)), rng.choice((0.0, 1e9)))
        learned.observe(x, rng.choice((1e-6, 0.5, 1e3)))
        assert all(c > 0 and math.isfinite(c) for c in learned.coefficients)
        shares = [c / a / learned.scale for c, a in zip(learned.coefficients, ASSUMED, strict=True)]
        assert min(shares) > MIN_SHARE / 4


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_duration_teaches_nothing(seconds):
    learned = fit()
    learned.observe((1.0, 10.0, 10.0), seconds)
    assert learned.num_seen == 0 and learned.coefficients == ASSUMED and learned.version == 0


def test_version_changes_with_the_coefficients():
    learned = fit()
    for n in range(200):
        before = learned.version, learned.coefficients
        learned.observe((1.0, 10.0 + n, 10.0), 0.01 + n / 1000)
        assert (learned.version == before[0]) == (learned.coefficients == before[1])


def test_ratio_of_a_slow_worker_is_found_and_bounded():
    ratios = RatioBook()
    for _ in range(400):
        ratios.observe("slow", 2.0, 1.0)
        ratios.observe("stuck", 500.0, 1.0)
    assert ratios.get("slow") == pytest.approx(2.0, rel=0.05)
    assert ratios.get("stuck") == pytest.approx(4.0)
    assert ratios.get("unknown") == 1.0
    ratios.observe("once", 2.0, 1.0)
    assert 1.0 < ratios.get("once") < 1.2
    for seconds, predicted in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        ratios.observe("none", seconds, predicted)
    assert ratios.get("none") == 1.0


def test_ratios_are_bounded_in_number():
    ratios = RatioBook()
    for n in range(RatioBook.MAX_WORKERS + 50):
        ratios.observe(str(n), 2.0, 1.0)
    assert ratios.get("0") == 1.0 and ratios.get(str(RatioBook.MAX_WORKERS)) > 1.0
