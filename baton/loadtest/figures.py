"""A run in figures: percentiles, rates, goodput, errors by kind. Pure.

    TTFT   sending to the first text            needs streaming
    ITL    mean gap between a request's tokens  (which others call TPOT)
    gap    every single gap, of all requests together (which others call ITL)
    E2E    sending to the end

Percentiles are linearly interpolated between ranks, and over requests that were answered. Rates
count what ended over the time from the first request's sending to the last one's end. Errors count
as misses of every target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from baton.loadtest.options import Targets
from baton.loadtest.outcome import Outcome

SHARES = (0.5, 0.9, 0.95, 0.99)
MIN_STEADY_SHARE = 0.2
"""Of the run; a shorter window says nothing that the whole does not."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of values in seconds."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Latencies:
    """None where nothing was measured."""

    ttft_s: Distribution | None
    itl_s: Distribution | None
    gap_s: Distribution | None
    e2e_s: Distribution | None
    connect_s: Distribution | None
    """Of requests that had to open a connection."""


@dataclass(frozen=True, slots=True)
class Rates:
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of all requests. None: there was no such target."""

    ttft: float | None
    itl: float | None
    e2e: float | None
    all: float
    """Answered, and within every target there is."""
    goodput_per_s: float
    """Requests that are that."""


@dataclass(frozen=True, slots=True)
class ErrorCount:
    label: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Steady:
    """From the first request's end to the last one's sending: neither warming up nor running
    out. Latencies of requests sent in it, tokens that came in it."""

    start_s: float
    end_s: float
    num_requests: int
    rates: Rates
    latencies: Latencies


@dataclass(frozen=True, slots=True)
class Figures:
    num_sent: int
    num_ok: int
    num_given_up: int
    """Under way when the run was stopped; in none of the other figures."""
    span_s: float
    num_prompt_tokens: int
    num_cached_tokens: int | None
    """None: the server does not tell."""
    num_output_tokens: int
    num_wrong_length: int
    """Answered with another number of tokens than asked for."""
    rates: Rates
    latencies: Latencies
    attainment: Attainment
    mean_in_flight: float
    max_in_flight: int
    errors: tuple[ErrorCount, ...]
    steady: Steady | None

    @property
    def cached_share(self) -> float | None:
        """Of prompt tokens."""
        if self.num_cached_tokens is None or not self.num_prompt_tokens:
            return None
        return self.num_cached_tokens / self.num_prompt_tokens


def figures_of(outcomes: Sequence[Outcome], targets: Targets) -> Figures:
    over = [o for o in outcomes if o.is_over]
    ok = [o for o in over if o.is_ok]
    start_s = min((o.sent_s for o in over), default=0.0)
    span_s = max(max((o.ended_s or 0.0 for o in over), default=0.0) - start_s, 1e-9)
    cached = [o.num_cached_tokens for o in ok if o.num_cached_tokens is not None]
    num_prompt = sum(o.num_prompt_tokens or 0 for o in ok)
    num_output = sum(o.num_tokens for o in ok)
    return Figures(
        num_sent=len(over),
        num_ok=len(ok),
        num_given_up=len(outcomes) - len(over),
        span_s=span_s,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=sum(cached) if cached else None,
        num_output_tokens=num_output,
        num_wrong_length=sum(o.num_tokens != o.num_asked_tokens for o in ok),
        rates=Rates(len(ok) / span_s, num_prompt / span_s, num_output / span_s),
        latencies=latencies_of(ok),
        attainment=_attainment(over, targets, span_s),
        mean_in_flight=sum(o.e2e_s or 0.0 for o in over) / span_s,
        max_in_flight=_max_in_flight(over),
        errors=_errors(over),
        steady=_steady(over, span_s),
    )


def latencies_of(outcomes: Sequence[Outcome]) -> Latencies:
    gaps = [np.diff(np.asarray(o.token_times_s)) for o in outcomes if len(o.token_times_s) > 1]
    return Latencies(
        ttft_s=distribution(o.ttft_s for o in outcomes),
        itl_s=distribution(o.itl_s for o in outcomes),
        gap_s=_distribution(np.concatenate(gaps)) if gaps else None,
        e2e_s=distribution(o.e2e_s for o in outcomes),
        connect_s=distribution(
            o.connected_s - o.sent_s for o in outcomes if o.connected_s is not None
        ),
    )


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """None without a value."""
    known = np.asarray([v for v in values if v is not None])
    return _distribution(known) if len(known) else None


def _distribution(values: np.ndarray) -> Distribution:
    p50, p90, p95, p99 = (float(v) for v in np.quantile(values, SHARES))
    return Distribution(
        len(values),
        float(values.mean()),
        float(values.min()),
        p50,
        p90,
        p95,
        p99,
        float(values.max()),
    )


def meets(outcome: Outcome, targets: Targets) -> tuple[bool, bool, bool]:
    """TTFT, ITL, E2E. What was not asked for is met, as is the ITL of a single token."""
    if not outcome.is_ok:
        return False, False, False

    def within(value: float | None, limit: float | None, *, if_none: bool) -> bool:
        return limit is None or (if_none if value is None else value <= limit)

    return (
        within(outcome.ttft_s, targets.ttft_s, if_none=False),
        within(outcome.itl_s, targets.itl_s, if_none=True),
        within(outcome.e2e_s, targets.e2e_s, if_none=False),
    )


def _attainment(over: Sequence[Outcome], targets: Targets, span_s: float) -> Attainment:
    met = [meets(o, targets) for o in over]
    total = max(1, len(met))

    def share(i: int, limit: float | None) -> float | None:
        return None if limit is None else sum(m[i] for m in met) / total

    num_good = sum(all(m) for m in met)
    return Attainment(
        ttft=share(0, targets.ttft_s),
        itl=share(1, targets.itl_s),
        e2e=share(2, targets.e2e_s),
        all=num_good / total,
        goodput_per_s=num_good / span_s,
    )


def _max_in_flight(over: Sequence[Outcome]) -> int:
    ends = [(o.ended_s or 0.0, -1) for o in over]
    # At equal times an end goes before a start.
    changes = sorted([*ends, *((o.sent_s, 1) for o in over)])
    return int(np.cumsum([step for _, step in changes]).max(initial=0))


def _errors(over: Sequence[Outcome]) -> tuple[ErrorCount, ...]:
    errors = [o.error for o in over if o.error is not None]
    examples = {error.label: error.message for error in reversed(errors)}
    counts = Counter(error.label for error in errors)
    return tuple(ErrorCount(label, n, examples[label]) for label, n in counts.most_common())


def _steady(over: Sequence[Outcome], span_s: float) -> Steady | None:
    ok = [o for o in over if o.is_ok]
    if len(ok) < 2:
        return None
    start_s = min(o.ended_s or 0.0 for o in ok)
    end_s = max(o.sent_s for o in ok)
    inside = [o for o in ok if start_s <= o.sent_s <= end_s]
    if end_s - start_s < MIN_STEADY_SHARE * span_s or len(inside) < 2:
        return None
    length_s = end_s - start_s
    ended = [o for o in ok if start_s <= (o.ended_s or 0.0) <= end_s]
    times = np.concatenate([np.asarray(o.token_times_s) for o in ok])
    # Pieces of text may hold several tokens; the ratio is the run's.
    num_pieces = sum(len(o.token_times_s) for o in ok)
    if num_pieces:
        per_piece = sum(o.num_tokens for o in ok) / num_pieces
        num_output = per_piece * int(((times >= start_s) & (times <= end_s)).sum())
    else:
        num_output = sum(o.num_tokens for o in ended)
    num_prompt = sum(o.num_prompt_tokens or 0 for o in ended)
    rates = Rates(len(ended) / length_s, num_prompt / length_s, num_output / length_s)
    return Steady(start_s, end_s, len(inside), rates, latencies_of(inside))
