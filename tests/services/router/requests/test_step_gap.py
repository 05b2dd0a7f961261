"""The time between decode steps as the messages show it."""

from __future__ import annotations

import pytest

from services.router.requests.step_gap import MAX_GAP_S, StepGap


def test_follows_a_growing_batch_within_a_few_steps():
    gap, now_s = StepGap(), 10.0
    for seconds in (0.01, 0.05):
        for _ in range(30):
            now_s += seconds
            gap.note(now_s, 1)
        assert gap.gap_s(now_s) == pytest.approx(seconds, rel=0.1)


def test_several_tokens_in_one_message_are_several_steps():
    gap, now_s = StepGap(), 10.0
    for _ in range(10):
        now_s += 0.04
        gap.note(now_s, 4)
    assert gap.gap_s(now_s) == pytest.approx(0.01)


def test_nothing_is_said_of_a_worker_that_stands_still_or_has_just_begun():
    gap, now_s = StepGap(), 10.0
    assert gap.gap_s(now_s) is None
    for _ in range(10):
        now_s += 0.01
        gap.note(now_s, 1)
    assert gap.gap_s(now_s) is not None
    now_s += MAX_GAP_S + 1
    assert gap.gap_s(now_s) is None
    gap.note(now_s, 1)
    gap.note(now_s + 0.01, 1)
    assert gap.gap_s(now_s + 0.01) is None, "the pause is no step"


def test_messages_without_tokens_are_no_steps():
    gap = StepGap()
    for step in range(10):
        gap.note(10.0 + 0.01 * step, 0)
    assert gap.gap_s(10.1) is None
