"""The time between decode steps as the messages show it."""

from __future__ import annotations

import pytest

from services.router.requests.step_gap import MAX_GAP_S, StepGap


def gap_s(gap: StepGap, now_s: float) -> float:
    decoding = gap.decoding(now_s)
    assert decoding is not None
    return decoding.gap_s


def test_follows_a_growing_batch_within_a_few_steps():
    gap, now_s = StepGap(), 10.0
    for seconds in (0.01, 0.05):
        for _ in range(30):
            now_s += seconds
            gap.note(now_s, 1, num_sequences=3, kv_tokens=300)
        assert gap_s(gap, now_s) == pytest.approx(seconds, rel=0.1)


def test_several_tokens_in_one_message_are_several_steps():
    gap, now_s = StepGap(), 10.0
    for _ in range(10):
        now_s += 0.04
        gap.note(now_s, 4, num_sequences=3, kv_tokens=300)
    assert gap_s(gap, now_s) == pytest.approx(0.01)


def test_nothing_is_said_of_a_worker_that_stands_still_or_has_just_begun():
    gap, now_s = StepGap(), 10.0
    assert gap.decoding(now_s) is None
    for _ in range(10):
        now_s += 0.01
        gap.note(now_s, 1, num_sequences=3, kv_tokens=300)
    assert gap.decoding(now_s) is not None
    now_s += MAX_GAP_S + 1
    assert gap.decoding(now_s) is None
    gap.note(now_s, 1, num_sequences=3, kv_tokens=300)
    gap.note(now_s + 0.01, 1, num_sequences=3, kv_tokens=300)
    assert gap.decoding(now_s + 0.01) is None, "the pause is no step"


def test_messages_without_tokens_are_no_steps():
    gap = StepGap()
    for step in range(10):
        gap.note(10.0 + 0.01 * step, 0, num_sequences=3, kv_tokens=300)
    assert gap.decoding(10.1) is None


def test_gap_and_batch_are_of_the_same_steps():
    gap, now_s = StepGap(), 10.0
    for step in range(200):
        num_sequences = 10 + step // 10
        seconds = 0.01 + 0.001 * num_sequences
        now_s += seconds
        gap.note(now_s, 1, num_sequences=num_sequences, kv_tokens=100 * num_sequences)
        decoding = gap.decoding(now_s)
        if decoding is not None and step > 20:
            of_batch_s = 0.01 + 0.001 * decoding.num_sequences
            assert decoding.gap_s == pytest.approx(of_batch_s, rel=1e-6)
            assert decoding.kv_tokens == pytest.approx(100 * decoding.num_sequences)
