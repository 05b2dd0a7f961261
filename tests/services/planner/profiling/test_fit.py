"""Coefficients from measured steps: found again, never negative, told how well they fit."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from baton.core.errors import ConfigError
from services.planner.profiling.fit import fit_steps, non_negative_least_squares
from services.planner.profiling.samples import StepKind, StepSample, medians

TRUE = (0.012, 3e-4, 2e-8, 9e-4, 4e-7)


def sample(
    kind: StepKind, terms: tuple[float, ...], *, true: tuple[float, ...] = TRUE, ratio: float = 1.0
) -> StepSample:
    seconds = ratio * sum(a * b for a, b in zip(terms, true, strict=True))
    return StepSample(f"{kind.value} {terms}", kind, int(terms[0]), *terms[1:], seconds)


def steps(**values: object) -> list[StepSample]:
    prompts = [
        (1.0, n, n * (c + n / 2), 0.0, 0.0) for n, c in itertools.product((16, 256, 512), (0, 1024))
    ]
    batches = [
        (8.0, 0.0, 0.0, 8.0 * b, 8.0 * b * c)
        for b, c in itertools.product((1, 4, 16), (32, 256, 1024))
    ]
    mixed = [(1.0, 64.0, 2048.0, float(b), 256.0 * b) for b in (1, 8)]
    kinds = zip(StepKind, (prompts, batches, mixed), strict=True)
    return [sample(kind, terms, **values) for kind, group in kinds for terms in group]  # type: ignore[arg-type]


def test_the_coefficients_that_made_the_steps_are_found() -> None:
    fit = fit_steps(steps())
    assert fit.coefficients == pytest.approx(TRUE, rel=1e-6)
    assert set(fit.residuals) == set(StepKind)
    assert max(r.worst for r in fit.residuals.values()) < 1e-6


def test_noise_moves_them_little_and_shows_as_residuals() -> None:
    rng = random.Random(3)
    noisy = [sample(s.kind, s.terms, ratio=rng.uniform(0.95, 1.05)) for s in steps()]
    fit = fit_steps(noisy)
    assert fit.coefficients[:2] == pytest.approx(TRUE[:2], rel=0.1)
    assert 0.005 < fit.residuals[StepKind.DECODE].median < 0.05


def test_a_disturbed_point_hardly_moves_the_fit() -> None:
    points = steps()
    points[3] = sample(points[3].kind, points[3].terms, ratio=3.0)
    fit = fit_steps(points)
    assert fit.coefficients == pytest.approx(TRUE, rel=0.12)
    assert fit.residuals[StepKind.PREFILL].worst > 0.5


def test_what_costs_nothing_is_0_and_nothing_is_negative() -> None:
    rng = random.Random(5)
    free = (0.01, 2e-4, 0.0, 1e-3, 0.0)
    for _ in range(20):
        noisy = [sample(s.kind, s.terms, true=free, ratio=rng.gauss(1, 0.05)) for s in steps()]
        assert min(fit_steps(noisy).coefficients) >= 0


def test_the_solution_is_the_best_non_negative_one() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        rows, wanted = rng.normal(size=(12, 4)), rng.normal(size=12)
        x = non_negative_least_squares(rows, wanted)
        assert (x >= 0).all()
        # Karush-Kuhn-Tucker: no allowed direction goes down.
        gradient = rows.T @ (rows @ x - wanted)
        assert (gradient > -1e-8).all()
        assert abs(gradient @ x) < 1e-8


def test_repetitions_become_their_median() -> None:
    one = sample(StepKind.DECODE, (8.0, 0.0, 0.0, 8.0, 800.0))
    slow = sample(StepKind.DECODE, (8.0, 0.0, 0.0, 8.0, 800.0), ratio=9.0)
    (median,) = medians([one, slow, one])
    assert median.seconds == pytest.approx(one.seconds)


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="no step was measured"):
        fit_steps([])
    with pytest.raises(ConfigError, match="took no time"):
        fit_steps([StepSample("x", StepKind.DECODE, 1, 0, 0, 1, 1, 0.0)])
