"""Percentiles, goodput and the time line of runs computed by hand."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from baton.loadtest.figures import distribution, figures_of
from baton.loadtest.options import Targets
from baton.loadtest.outcome import ErrorKind, Outcome
from baton.loadtest.timeline import timeline_of


def answered(
    sent_s: float, times: list[float], *, number: int = 0, num_tokens: int | None = None
) -> Outcome:
    outcome = Outcome(number, lambda: 0.0, sent_s=sent_s, num_asked_tokens=len(times))
    outcome.token_times_s = array("d", times)
    outcome.num_prompt_tokens, outcome.num_cached_tokens = 100, 25
    outcome.num_output_tokens = len(times) if num_tokens is None else num_tokens
    outcome.end(times[-1])
    return outcome


def failed(sent_s: float, at_s: float) -> Outcome:
    outcome = Outcome(0, lambda: at_s, sent_s=sent_s)
    outcome.fail(ErrorKind.REFUSED, "no", "429")
    return outcome


def test_figures_of_three_requests() -> None:
    outcomes = [
        answered(0.0, [0.5, 0.6, 0.7]),
        answered(1.0, [1.2, 1.6]),
        failed(1.0, 1.1),
        Outcome(9, lambda: 0.0, sent_s=1.9),
    ]
    figures = figures_of(outcomes, Targets(ttft_s=0.3, itl_s=0.2))
    assert (figures.num_sent, figures.num_ok, figures.num_given_up) == (3, 2, 1)
    assert figures.span_s == pytest.approx(1.6)
    assert figures.rates.requests_per_s == pytest.approx(2 / 1.6)
    assert figures.rates.output_tokens_per_s == pytest.approx(5 / 1.6)
    assert figures.cached_share == 0.25
    ttft, gaps = figures.latencies.ttft_s, figures.latencies.gap_s
    assert ttft is not None and gaps is not None
    assert (ttft.min, ttft.p50, ttft.max) == pytest.approx((0.2, 0.35, 0.5))
    assert (gaps.count, gaps.p50) == (3, pytest.approx(0.1))
    shares = figures.attainment
    # The first misses TTFT, the second ITL, the third all.
    assert (shares.ttft, shares.itl, shares.all) == pytest.approx((1 / 3, 1 / 3, 0.0))
    assert (figures.errors[0].label, figures.errors[0].example) == ("refused 429", "no")
    assert figures.max_in_flight == 2


def test_percentiles_are_numpys() -> None:
    values = [float(v) for v in np.random.default_rng(1).exponential(size=501)]
    told = distribution(values)
    assert told is not None
    expected = np.percentile(values, [50, 90, 95, 99])
    assert [told.p50, told.p90, told.p95, told.p99] == pytest.approx(list(expected))
    assert distribution([None]) is None


def test_tokens_are_counted_by_the_server_even_when_they_come_together() -> None:
    outcome = answered(0.0, [1.0, 2.0], num_tokens=5)
    assert outcome.itl_s == pytest.approx(1.0 / 4)
    figures = figures_of([outcome], Targets())
    assert figures.num_output_tokens == 5
    assert figures.num_wrong_length == 1


def test_the_steady_window_leaves_out_beginning_and_end() -> None:
    # Four at a time, each a second long, sent one after the other in four lanes.
    outcomes = [
        answered(i + lane / 4, [i + lane / 4 + 0.5, i + lane / 4 + 1.0])
        for i in range(10)
        for lane in range(4)
    ]
    steady = figures_of(outcomes, Targets()).steady
    assert steady is not None
    assert (steady.start_s, steady.end_s) == (1.0, 9.75)
    assert steady.rates.requests_per_s == pytest.approx(4, rel=0.05)
    assert steady.rates.output_tokens_per_s == pytest.approx(8, rel=0.05)


def test_a_burst_has_no_steady_window() -> None:
    assert figures_of([answered(0.0, [5.0, 6.0]) for _ in range(5)], Targets()).steady is None


def test_nothing_sent_is_figures_too() -> None:
    figures = figures_of([], Targets(ttft_s=1))
    assert (figures.num_sent, figures.attainment.all, figures.latencies.ttft_s) == (0, 0.0, None)
    assert timeline_of([], Targets()).sent_per_s == (0.0,)


def test_a_single_token_has_no_itl_to_miss() -> None:
    figures = figures_of([answered(0.0, [0.1])], Targets(itl_s=0.01))
    assert figures.attainment.itl == 1.0


def test_the_time_line_adds_up() -> None:
    outcomes = [answered(i * 0.1, [i * 0.1 + 0.2, i * 0.1 + 0.5]) for i in range(50)]
    outcomes.append(failed(2.0, 2.1))
    line = timeline_of(outcomes, Targets(ttft_s=1))
    assert sum(line.sent_per_s) * line.slice_s == pytest.approx(51)
    assert sum(line.ended_per_s) * line.slice_s == pytest.approx(50)
    assert sum(line.failed_per_s) * line.slice_s == pytest.approx(1)
    assert sum(line.output_tokens_per_s) * line.slice_s == pytest.approx(100)
    assert line.in_flight[-1] == 0
    assert min(a for a in line.attainment if a is not None) < 1
