"""Multipliers from measured seconds: where they go, how fast, and what never moves them."""

from __future__ import annotations

import math
import random

import pytest

from made_up_worker import MODEL
from services.planner.correction import (
    HALF_LIFE_S,
    MAX_ERROR_RATIO,
    MAX_RATIO,
    MIN_RATIO,
    Correction,
    corrected,
)


def fed(ratio: float, num: int = 100, gap_s: float = 10.0) -> Correction:
    correction = Correction()
    for i in range(num):
        correction.observe(2.0, 2.0 * ratio, i * gap_s)
    return correction


def told(correction: Correction) -> tuple[float, float]:
    return correction.ratio, correction.error_ratio


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.3, 3.0])
def test_a_lasting_difference_is_taken_over_and_then_no_error_is_left(ratio: float) -> None:
    correction = fed(ratio)
    assert correction.ratio == pytest.approx(ratio, rel=0.01)
    assert correction.error_ratio < 0.05


def test_the_first_sample_counts_at_once_within_its_bound() -> None:
    correction = Correction()
    assert correction.observe(1.0, 1.5, 0.0) == pytest.approx(1.5)
    assert correction.error_ratio == pytest.approx(1 / 3)
    assert Correction().observe(1.0, 100.0, 0.0) == pytest.approx(2.0)


def test_half_of_a_change_is_taken_over_in_a_half_life() -> None:
    correction = fed(1.0)
    now_s = 99 * 10.0
    for _ in range(12):
        now_s += HALF_LIFE_S / 12
        correction.observe(1.0, 1.5, now_s)
    assert math.log(correction.ratio) == pytest.approx(math.log(1.5) / 2, rel=0.05)


def test_one_wild_sample_moves_little() -> None:
    correction = fed(1.0)
    correction.observe(1.0, 50.0, 1000.0)
    assert correction.ratio < 1.1


@pytest.mark.parametrize(
    ("predicted_s", "measured_s", "now_s"),
    [(0.0, 1.0, 1e4), (1.0, 0.0, 1e4), (-1.0, 1.0, 1e4), (1.0, math.nan, 1e4),
     (math.inf, 1.0, 1e4), (1.0, 1.0, math.nan)],
)  # fmt: skip
def test_what_is_no_duration_is_ignored(
    predicted_s: float, measured_s: float, now_s: float
) -> None:
    correction = fed(1.3)
    before = told(correction)
    correction.observe(predicted_s, measured_s, now_s)
    assert told(correction) == before


def test_cold_samples_are_ignored() -> None:
    correction = fed(1.0)
    before = told(correction)
    for i in range(50):
        correction.observe(1.0, 3.0, 2000.0 + i, is_cold=True)
    assert told(correction) == before


def test_a_restart_goes_on_where_it_was_and_one_sample_does_not_undo_it() -> None:
    before = fed(1.6)
    after = Correction()
    after.restore(*told(before))
    assert told(after) == pytest.approx(told(before))
    after.observe(1.0, 1.0, 5.0)
    assert 1.4 < after.ratio < 1.6
    for i in range(300):
        after.observe(1.0, 1.0, 5.0 + 10 * i)
    assert after.ratio == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "error_ratio"), [(math.nan, 0.0), (99.0, 1e9), (0.0, 0.0), (-1.0, 0.1), (1.0, -3.0)]
)
def test_numbers_that_cannot_be_are_brought_within_bounds(ratio: float, error_ratio: float) -> None:
    correction = Correction()
    correction.restore(ratio, error_ratio)
    assert MIN_RATIO <= correction.ratio <= MAX_RATIO + 1e-9
    assert 0 <= correction.error_ratio <= MAX_ERROR_RATIO


def test_random_samples_never_leave_the_bounds() -> None:
    rng = random.Random(7)
    correction, now_s = Correction(), 0.0
    for _ in range(20_000):
        # A clock that is set back, too.
        now_s += rng.choice((0.0, 0.1, 10.0, 500.0, -20.0))
        before = correction.ratio
        measured_s = math.exp(rng.uniform(-12, 12))
        correction.observe(1.0, measured_s, now_s, is_cold=rng.random() < 0.1)
        assert MIN_RATIO - 1e-9 <= correction.ratio <= MAX_RATIO + 1e-9
        assert 0.5 - 1e-9 <= correction.ratio / before <= 2 + 1e-9
        assert 0 <= correction.error_ratio <= MAX_ERROR_RATIO
        if rng.random() < 0.01:
            saved, correction = told(correction), Correction()
            correction.restore(*saved)


def test_a_corrected_model_takes_its_steps_that_much_longer_and_is_otherwise_the_same() -> None:
    slower = corrected(MODEL, 1.5)
    assert slower.hardware.step_fixed_s == pytest.approx(1.5 * MODEL.hardware.step_fixed_s)
    assert slower.hardware.decode_kv_token_s == pytest.approx(
        1.5 * MODEL.hardware.decode_kv_token_s
    )
    assert slower.hardware.link_bytes_per_second == MODEL.hardware.link_bytes_per_second
    assert (slower.max_kv_tokens, slower.start_s) == (MODEL.max_kv_tokens, MODEL.start_s)
    assert corrected(MODEL, 1.0) == MODEL
