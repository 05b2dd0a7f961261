"""A run over time: what was sent, under way, and came, in equal slices. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton.loadtest.figures import meets
from baton.loadtest.options import Targets
from baton.loadtest.outcome import Outcome

MAX_SLICES = 120
MIN_SLICES = 20
REQUESTS_PER_SLICE = 4
"""At least on average; rates of fewer are noise."""
MIN_SLICE_S = 0.25


@dataclass(frozen=True, slots=True)
class Timeline:
    """All of the same length, one value per slice."""

    slice_s: float
    sent_per_s: tuple[float, ...]
    ended_per_s: tuple[float, ...]
    failed_per_s: tuple[float, ...]
    output_tokens_per_s: tuple[float, ...]
    in_flight: tuple[float, ...]
    """At the end of the slice."""
    attainment: tuple[float | None, ...]
    """Share of the requests sent in the slice that met all targets; None without requests."""


def timeline_of(outcomes: Sequence[Outcome], targets: Targets) -> Timeline:
    over = [o for o in outcomes if o.is_over]
    end_s = max((o.ended_s or 0.0 for o in over), default=0.0)
    num_slices = min(MAX_SLICES, max(MIN_SLICES, len(over) // REQUESTS_PER_SLICE))
    slice_s = max(end_s / num_slices, MIN_SLICE_S)
    edges = np.arange(int(end_s / slice_s) + 2) * slice_s
    sent = np.asarray([o.sent_s for o in over])
    ended = np.asarray([o.ended_s or 0.0 for o in over])
    ok = np.asarray([o.is_ok for o in over], dtype=bool)
    good = np.asarray([all(meets(o, targets)) for o in over], dtype=bool)
    tokens = np.zeros(len(edges) - 1)
    for outcome in over:
        tokens += _tokens(outcome, edges)

    def count(times: np.ndarray) -> np.ndarray:
        return np.histogram(times, edges)[0]

    num_sent, num_good = count(sent), count(sent[good])
    return Timeline(
        slice_s,
        _rate(num_sent, slice_s),
        _rate(count(ended[ok]), slice_s),
        _rate(count(ended[~ok]), slice_s),
        _rate(tokens, slice_s),
        tuple(float(v) for v in np.cumsum(num_sent - count(ended))),
        tuple(float(g / n) if n else None for g, n in zip(num_good, num_sent, strict=True)),
    )


def _tokens(outcome: Outcome, edges: np.ndarray) -> np.ndarray:
    """Tokens of a request by slice; all at its end where none were seen to come."""
    times = np.asarray(outcome.token_times_s)
    if not len(times):
        times = np.asarray([outcome.ended_s or 0.0])
    return np.histogram(times, edges)[0] * (outcome.num_tokens / len(times))


def _rate(counts: np.ndarray, slice_s: float) -> tuple[float, ...]:
    return tuple(float(v) for v in counts / slice_s)
