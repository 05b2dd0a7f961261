"""Rates of a queue, promises to those sent away, margins."""

from __future__ import annotations

import random

import pytest

from services.router.admission.drain import MAX_PROMISES, DrainMeter, RetryLedger
from services.router.admission.safety_margin import SafetyMargin


def test_nothing_is_known_before_there_was_a_queue():
    meter = DrainMeter()
    meter.taken(1000, 5.0)
    assert meter.tokens_per_s(10.0) is None
    meter.assume(200.0)
    assert meter.tokens_per_s(10.0) == 200.0


def test_measured_rate_replaces_the_assumed_one_within_a_second():
    meter = DrainMeter()
    meter.assume(1e6)
    meter.set_backlogged(True, 100.0)
    now_s = 100.0
    for _ in range(20):
        now_s += 0.1
        meter.taken(50, now_s)
    assert meter.tokens_per_s(now_s) == pytest.approx(500, rel=0.1)


def test_idle_time_is_not_counted():
    meter = DrainMeter()
    now_s = 0.0
    for _ in range(10):
        meter.set_backlogged(True, now_s)
        for _ in range(10):
            now_s += 0.1
            meter.taken(50, now_s)
        meter.set_backlogged(False, now_s)
        now_s += 1000.0
    # Half a second after each queue still counts, since one that comes and goes is one.
    assert meter.tokens_per_s(now_s) == pytest.approx(500 / 1.5, rel=0.1)


def test_queue_that_is_empty_now_and_then_does_not_make_the_rate_too_high():
    # One server, half a second a piece; a request waits for the last tenth of each.
    meter = DrainMeter()
    now_s = 0.0
    for _ in range(100):
        now_s += 0.4
        meter.set_backlogged(True, now_s)
        now_s += 0.1
        meter.taken(100, now_s)
        meter.set_backlogged(False, now_s)
    assert meter.tokens_per_s(now_s) == pytest.approx(200, rel=0.1)


def test_rate_follows_a_change_of_the_machine():
    meter = DrainMeter()
    meter.set_backlogged(True, 0.0)
    now_s = 0.0
    for rate in (1000, 100):
        for _ in range(200):
            now_s += 0.1
            meter.taken(rate * 0.1, now_s)
        assert meter.tokens_per_s(now_s) == pytest.approx(rate, rel=0.2)


def test_standstill_is_seen_as_one():
    meter = DrainMeter()
    meter.set_backlogged(True, 0.0)
    meter.taken(1000, 0.5)
    rates = [meter.tokens_per_s(t) for t in (2.0, 10.0, 30.0)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1.0


def test_promises_are_outstanding_until_they_are_due():
    ledger = RetryLedger()
    ledger.promise(10.0, 100)
    ledger.promise(12.0, 200)
    assert ledger.outstanding_tokens(9.0) == 300
    assert ledger.outstanding_tokens(10.0) == 200
    assert ledger.outstanding_tokens(12.5) == 0


def test_promises_are_bounded_in_number():
    ledger = RetryLedger()
    for i in range(MAX_PROMISES + 500):
        ledger.promise(1e9 + i, 1)
    assert ledger.outstanding_tokens(0.0) == MAX_PROMISES


def test_margin_settles_where_nearly_all_predictions_are_safe():
    margin, rng = SafetyMargin(), random.Random(1)
    for _ in range(4000):
        margin.learn(1.0, 1.0 + rng.gauss(0.1, 0.05), 1.2)
    outcomes = [0.1 + rng.gauss(0, 0.05) for _ in range(2000)]
    safe = sum(o <= margin.margin_s for o in outcomes) / len(outcomes)
    assert 0.85 <= safe <= 0.995


def test_margin_does_not_grow_where_there_is_time_enough():
    margin = SafetyMargin()
    for _ in range(100):
        margin.learn(0.01, 0.2, 1.0)
    assert margin.margin_s == 0.0


def test_margin_of_others_is_not_lost_to_a_target_that_is_too_small_for_it():
    margin = SafetyMargin()
    for _ in range(10):
        margin.learn(0.5, 100.0, 1.0)
    learned_s = margin.margin_s
    for _ in range(100):
        margin.learn(0.5, 0.6, 0.001)
    assert margin.margin_s == learned_s
    assert margin.of(1.0) == learned_s and margin.of(0.001) == 0.0005


def test_margin_is_bounded_and_comes_back():
    margin = SafetyMargin()
    for _ in range(1000):
        margin.learn(0.5, 100.0, 1.0)
    assert margin.margin_s == 0.5
    for _ in range(1000):
        margin.learn(0.5, 0.4, 1.0)
    assert margin.margin_s == 0.0
