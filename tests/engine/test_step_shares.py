"""Engine time of requests: all of it, divided by tokens, and none of it twice."""

from __future__ import annotations

import random

import pytest

from baton.core.clock import ManualClock
from baton.core.lifecycle import EngineUse
from baton.engine.sequence import Sequence
from baton.engine.step_shares import StepShares

PROMPT = [(3 + 11 * i) % 97 for i in range(22)]


@pytest.fixture
def sequences(harness):
    return [Sequence(harness.make_request(f"r{i}", PROMPT)) for i in range(3)]


def run_step(shares: StepShares, clock: ManualClock, seconds: float, parts) -> None:
    started_at_s = shares.now()
    shares.launched(started_at_s)
    clock.advance(seconds)
    shares.over(parts)


def test_step_is_divided_by_tokens(sequences):
    a, b, _ = sequences
    clock = ManualClock()
    shares = StepShares(clock)
    run_step(shares, clock, 1.0, [(a, 3), (b, 1)])
    run_step(shares, clock, 0.5, [(b, 1)])
    assert a.timeline.engine == EngineUse(0.75, 1)
    assert b.timeline.engine == EngineUse(0.75, 2)
    assert shares.busy_s == 1.5 and shares.num_steps == 2


def test_idle_time_counts_for_nobody(sequences):
    clock = ManualClock()
    shares = StepShares(clock)
    run_step(shares, clock, 1.0, [(sequences[0], 1)])
    clock.advance(100)
    run_step(shares, clock, 1.0, [(sequences[0], 1)])
    assert sequences[0].timeline.engine.seconds == shares.busy_s == 2.0


def test_steps_in_flight_together_do_not_count_twice(sequences):
    a, b, _ = sequences
    clock = ManualClock()
    shares = StepShares(clock)
    shares.launched(shares.now())
    clock.advance(0.25)
    shares.launched(shares.now())
    clock.advance(0.75)
    shares.over([(a, 1)])
    clock.advance(1.0)
    shares.over([(b, 1)])
    assert (a.timeline.engine.seconds, b.timeline.engine.seconds) == (1.0, 1.0)
    assert shares.busy_s == 2.0


def test_ranks_multiply_what_requests_use_and_not_how_long_the_engine_was_busy(sequences):
    clock = ManualClock()
    shares = StepShares(clock, num_ranks=4)
    run_step(shares, clock, 0.5, [(sequences[0], 1)])
    assert sequences[0].timeline.engine.seconds == 2.0 and shares.busy_s == 0.5


def test_step_of_which_nothing_lives_is_busy_time_of_nobody(sequences):
    clock = ManualClock()
    shares = StepShares(clock)
    run_step(shares, clock, 1.0, [])
    assert shares.busy_s == 1.0


def test_after_an_abort_old_launches_do_not_count(sequences):
    clock = ManualClock()
    shares = StepShares(clock)
    shares.launched(shares.now())
    clock.advance(50)
    shares.aborted()
    run_step(shares, clock, 1.0, [(sequences[0], 1)])
    assert shares.busy_s == 1.0


def test_engine_divides_all_its_time_among_its_requests(make_harness, assert_engine_empty):
    rng = random.Random(5)
    h = make_harness(64, max_num_batched_tokens=16)
    for i in range(30):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 30))]
        h.submit(f"r{i}", prompt, max_tokens=rng.randint(1, 12))
        for _ in range(rng.randint(0, 6)):
            h.step()
    h.run()
    used = [record.last.timeline.engine for record in h.records.values()]
    load = h.engine.load()
    assert sum(use.seconds for use in used) == pytest.approx(load.busy_seconds)
    assert load.num_steps == len(h.runner.batches)
    assert all(use.num_steps >= 1 for use in used)
    assert_engine_empty(h.engine)
