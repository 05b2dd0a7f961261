"""Sequences that will have left the decode batches, and how long outputs get."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from baton.core.worker_info import WorkerId
from services.router.admission.output_lengths import OutputLengths
from services.router.admission.turnover import FRESH_S, NOTHING, Turnover

D0, D1 = WorkerId("d0"), WorkerId("d1")
MANY = 1 << 20


@dataclass(eq=False)
class Fake:
    num_output_tokens: int = 1
    max_output_tokens: int = MANY
    num_prompt_tokens: int = 100


def hazard(lengths: OutputLengths, age: float, *, beside: int = 0) -> float:
    return float(lengths.hazards(np.array([age] * (beside + 1)))[0])


def test_before_anything_has_ended_the_expected_length_counts():
    assert 1 / hazard(OutputLengths(256), 1.0) == pytest.approx(256, rel=0.1)


@pytest.mark.parametrize("mean", [4, 50, 1000])
def test_chance_of_ending_follows_what_has_ended(mean):
    rng, lengths = random.Random(1), OutputLengths(256)
    for _ in range(2000):
        lengths.ended(max(1, int(rng.expovariate(1 / mean))))
    for age in (0.25 * mean, mean, 2 * mean):
        assert 1 / hazard(lengths, age) == pytest.approx(mean, rel=0.5)


def test_sequences_that_do_not_end_show_it_before_one_has_ended():
    lengths = OutputLengths(256)
    for _ in range(500):
        lengths.ended(32)
    # Of the short ones; then forty that are already longer.
    assert hazard(lengths, 20.0) > 1 / 20
    assert hazard(lengths, 200.0, beside=39) < 1 / 500


def test_one_that_its_client_cut_off_says_only_that_it_was_not_over_before():
    lengths = OutputLengths(256)
    for _ in range(500):
        lengths.ended(32, is_bound=True)
    assert hazard(lengths, 20.0) < 1 / 2000


def test_counts_for_certain_what_reaches_its_bound_and_the_rest_by_chance():
    turnover = Turnover(256)
    for left in (5, 10, 20, 1000):
        turnover.add(D0, Fake(50, 50 + left))
    turnover.add(D1, Fake(1, MANY, 7))
    ending = turnover.ending(D0, 10, 0.0)
    assert ending.num_sequences == pytest.approx(2 + 2 * 10 / 256, abs=0.15)
    assert ending.kv_tokens == pytest.approx(150 * ending.num_sequences)
    assert turnover.ending(D0, 1e9, 0.0).num_sequences == pytest.approx(4)
    assert 0 < turnover.ending(D1, 10, 0.0).num_sequences < 0.1
    assert turnover.ending(WorkerId("unknown"), 1e9, 0.0) == NOTHING


def test_one_without_a_token_is_still_to_join():
    turnover, sequence = Turnover(16), Fake(0, 4)
    turnover.add(D0, sequence)
    assert turnover.ending(D0, 1e9, 0.0) == NOTHING
    sequence.num_output_tokens = 1
    assert turnover.ending(D0, 1e9, 2 * FRESH_S).num_sequences == 1.0


def test_many_sequences_come_and_go_and_nothing_is_left():
    rng, turnover, now_s = random.Random(1), Turnover(256), 0.0
    running: list[tuple[WorkerId, Fake]] = []
    for _ in range(5000):
        now_s += rng.expovariate(100)
        if rng.random() < 0.5 or not running:
            running.append((rng.choice([D0, D1]), Fake(0, rng.randrange(1, 500))))
            turnover.add(*running[-1])
        else:
            turnover.remove(*running.pop(rng.randrange(len(running))))
        for _, sequence in running:
            sequence.num_output_tokens += rng.random() < 0.3
        steps = rng.choice([0.0, 1.0, 1e6])
        for worker_id in (D0, D1):
            ending = turnover.ending(worker_id, steps, now_s)
            assert ending.num_sequences >= 0 and ending.kv_tokens >= 0
        assert len(turnover) == len(running)
    for entry in running:
        turnover.remove(*entry)
    assert not len(turnover) and not turnover.workers
    assert turnover.ending(D0, 1e6, now_s + 10) == NOTHING
