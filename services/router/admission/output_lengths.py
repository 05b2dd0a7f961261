"""How long outputs get, learned from those that ended and those that have not. Pure.

    hazard(age)   chance that a sequence of so many output tokens ends by itself with the next one

Ages are taken in ranges that double. In each, hazard is ends over tokens generated; tokens of
sequences that still run count too, so a batch that does not end shows before anything has ended: a
mean of finished requests would take long outputs for short ones until they are over.

Source: the life-table estimate of a hazard under censoring, as in Kaplan and Meier, "Nonparametric
estimation from incomplete observations" (1958).

Does not know: workers, time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_RANGES = 24
_ENDS_OF_RANGES = 2.0 ** np.arange(NUM_RANGES)
_STARTS_OF_RANGES = np.concatenate(([0.0], _ENDS_OF_RANGES[:-1]))
_WIDTHS = _ENDS_OF_RANGES - _STARTS_OF_RANGES

MEMORY = 256
"""Ended sequences that count."""
PRIOR_ENDS = 2.0
"""Weight of the mean hazard in a range where little was seen, in ends."""


class OutputLengths:
    """Of one model."""

    def __init__(self, expected_tokens: float) -> None:
        """`expected_tokens`: mean length until something has ended."""
        self._expected_tokens = expected_tokens
        self._ends = np.zeros(NUM_RANGES)
        self._tokens = np.zeros(NUM_RANGES)

    def ended(self, num_tokens: int, *, is_bound: bool = False) -> None:
        """A sequence is over after so many tokens. `is_bound`: its client takes no more, which says
        only that it was not over before."""
        keep = 1.0 - 1.0 / MEMORY
        self._ends *= keep
        self._tokens *= keep
        length = np.array([float(num_tokens)])
        self._tokens += _tokens_in_ranges(length)
        if not is_bound:
            # In the range of its last token.
            self._ends[_range_of(length - 0.5)] += 1.0

    def hazards(self, ages: Floats) -> Floats:
        """Of running sequences that have so many tokens each, all of them at once."""
        tokens = self._tokens + _tokens_in_ranges(ages)
        mean = (self._ends.sum() + 1.0) / (tokens.sum() + self._expected_tokens)
        by_range = (self._ends + PRIOR_ENDS) / (tokens + PRIOR_ENDS / mean)
        taken: Floats = by_range[_range_of(ages)]
        return taken


def _range_of(ages: Floats) -> NDArray[np.intp]:
    return np.minimum(np.searchsorted(_ENDS_OF_RANGES, ages, side="right"), NUM_RANGES - 1)


def _tokens_in_ranges(ages: Floats) -> Floats:
    """Tokens that sequences of these ages have generated in each range, together."""
    lived: Floats = np.clip(ages[:, None] - _STARTS_OF_RANGES, 0.0, _WIDTHS).sum(axis=0)
    return lived
