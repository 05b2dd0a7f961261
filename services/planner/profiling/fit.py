"""Coefficients of `Hardware` from measured steps: non-negative least squares on relative errors.

A step that is predicted 10 % too long counts as much whether it takes a millisecond or a second, so
every row is divided by its seconds. What is far off counts less in further rounds (Huber's
weights): disturbances of a measurement only ever make it longer. With five unknowns the
non-negative solution is found exactly: the best of all least-squares solutions over subsets of the
terms that have no negative coefficient, since the optimum solves its own support without
constraints.

Does not know: engines, files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton.core.errors import ConfigError
from services.planner.profiling.samples import StepKind, StepSample

NUM_REWEIGHTINGS = 5
LIMIT_MEDIANS = 2.0
"""Median errors up to which a point counts fully."""
MIN_LIMIT = 0.02


@dataclass(frozen=True, slots=True)
class Residuals:
    """Relative errors of a fit, |predicted - measured| / measured."""

    num_points: int
    median: float
    p90: float
    worst: float


@dataclass(frozen=True, slots=True)
class StepFit:
    """Seconds, as in `Hardware`."""

    step_fixed_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_sequence_s: float
    decode_kv_token_s: float
    residuals: dict[StepKind, Residuals]

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        return (
            self.step_fixed_s,
            self.prefill_token_s,
            self.prefill_pair_s,
            self.decode_sequence_s,
            self.decode_kv_token_s,
        )


def fit_steps(samples: Sequence[StepSample]) -> StepFit:
    """Raises ConfigError when nothing was measured, or a measurement took no time."""
    if not samples:
        raise ConfigError("no step was measured, so there is nothing to fit")
    if any(not s.seconds > 0 for s in samples):
        raise ConfigError("a measured step took no time; the clock is too coarse for this engine")
    terms = np.array([s.terms for s in samples])
    seconds = np.array([s.seconds for s in samples])
    rows = terms / seconds[:, None]
    coefficients = non_negative_least_squares(rows, np.ones(len(samples)))
    errors = np.abs(rows @ coefficients - 1)
    for _ in range(NUM_REWEIGHTINGS):
        limit = max(MIN_LIMIT, LIMIT_MEDIANS * float(np.median(errors)))
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(errors, 1e-12)))
        coefficients = non_negative_least_squares(rows * weights[:, None], weights)
        errors = np.abs(rows @ coefficients - 1)
    kinds = np.array([s.kind.value for s in samples])
    residuals = {
        kind: _residuals(errors[kinds == kind.value])
        for kind in StepKind
        if (kinds == kind.value).any()
    }
    fixed_s, token_s, pair_s, sequence_s, kv_token_s = map(float, coefficients)
    return StepFit(fixed_s, token_s, pair_s, sequence_s, kv_token_s, residuals)


def non_negative_least_squares(
    rows: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    wanted: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The x >= 0 that minimises |rows x - wanted|, for few columns: `rows` is [points, terms]."""
    num_terms = rows.shape[1]
    # Terms differ by many orders of magnitude.
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    scaled = rows / scale
    best = np.zeros(num_terms)
    least = float(np.sum(wanted**2))
    for size in range(1, num_terms + 1):
        for chosen in itertools.combinations(range(num_terms), size):
            columns = scaled[:, chosen]
            solution = np.linalg.lstsq(columns, wanted, rcond=None)[0]
            error = float(np.sum((columns @ solution - wanted) ** 2))
            if (solution >= 0).all() and error < least:
                best = np.zeros(num_terms)
                best[list(chosen)] = solution
                least = error
    return np.asarray(best / scale)


def _residuals(errors: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Residuals:
    return Residuals(
        len(errors),
        float(np.median(errors)),
        float(np.percentile(errors, 90)),
        float(errors.max()),
    )
