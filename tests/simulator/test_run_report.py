"""Figures of a run: who kept what, and when."""

from __future__ import annotations

import pytest

from baton.simulator.outcome import Outcome
from baton.simulator.run_report import keeps, run_report
from services.router.admission.slo import SloTargets

TARGETS = SloTargets(ttft_s=0.5, itl_s=0.1)


def outcome(number: int, at_s: float, ttft_s: float, itl_s: float, tokens: int = 11) -> Outcome:
    first_s = at_s + ttft_s
    return Outcome(
        number, at_s, 100, prefill="p0", decode="d0", first_token_s=first_s,
        last_token_s=first_s + itl_s * (tokens - 1), num_output_tokens=tokens,
    )  # fmt: skip


GOOD = outcome(0, 0.0, 0.4, 0.05)
LATE = outcome(1, 10.0, 0.6, 0.05)
SLOW = outcome(2, 20.0, 0.4, 0.2)
REFUSED = Outcome(3, 30.0, 100, refused_s=30.0)


@pytest.mark.parametrize(
    ("what", "is_kept"), [(GOOD, True), (LATE, False), (SLOW, False), (REFUSED, False)]
)
def test_a_request_keeps_all_targets_or_none(what: Outcome, is_kept: bool) -> None:
    assert keeps(what, TARGETS) is is_kept


def test_only_targets_that_were_set_count() -> None:
    assert keeps(LATE, SloTargets(itl_s=0.1))
    assert keeps(SLOW, SloTargets(ttft_s=0.5))


def test_shares_count_refused_requests_and_goodput_only_kept_ones() -> None:
    report = run_report(
        [GOOD, LATE, SLOW, REFUSED], {"p0": 11.2, "d0": 2.24}, TARGETS, num_devices=3
    )
    span_s = SLOW.last_token_s
    assert report.attainment == 0.25
    assert report.refused_share == 0.25
    assert report.goodput_per_s == pytest.approx(1 / span_s)
    assert report.output_tokens_per_s == pytest.approx(33 / span_s)
    assert report.device_hours == pytest.approx(3 * span_s / 3600)
    uses = {use.worker_id: use for use in report.workers}
    assert uses["p0"].busy_share == pytest.approx(11.2 / span_s)
    assert (uses["p0"].num_prompts, uses["d0"].num_decoded) == (3, 3)


def test_windows_cover_every_arrival_once() -> None:
    outcomes = [outcome(i, i * 0.37, 0.4 + 0.2 * (i % 2), 0.05) for i in range(100)]
    report = run_report(outcomes, {}, TARGETS, num_devices=1)
    length_s = report.windows[1].start_s
    assert sum(w.rate_per_s * length_s for w in report.windows) == pytest.approx(100)
    kept = sum((w.attainment or 0) * w.rate_per_s * length_s for w in report.windows)
    assert kept == pytest.approx(50)


def test_nothing_simulated_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        run_report([], {}, TARGETS, num_devices=1)


def test_what_moved_and_what_was_paid_for_are_told() -> None:
    handed = Outcome(
        0, 0.0, 100, first_token_s=1.0, last_token_s=4.0, num_output_tokens=3,
        num_handed_tokens=80, num_fetched_tokens=20,
    )  # fmt: skip
    report = run_report([handed], {}, TARGETS, device_s=7200, kv_bytes_per_token=1000)
    assert report.moved_bytes == 100_000
    assert report.moved_bytes_per_s == pytest.approx(25_000)
    assert report.device_hours == 2
