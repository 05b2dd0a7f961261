"""What a placement would mean by the time its prompt is computed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from baton.core.worker_info import Role, WorkerId
from services.router.admission.foresight import LEARN_PERIOD_S, Foresight
from services.router.admission.slo import SloTargets
from services.router.admission.ticket import Ticket
from services.router.placement.perf_config import PerfConfig
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import (
    Placement,
    PlacementKind,
    Prediction,
    ScoreTerms,
)
from services.router.requests.step_gap import Decoding

P0, D0, D1 = WorkerId("p0"), WorkerId("d0"), WorkerId("d1")
MODEL = "m"
CONFIG = PerfConfig(itl_fixed_s=0.01, itl_sequence_s=0.001, itl_kv_token_s=1e-9)


@dataclass(eq=False)
class Fake:
    num_output_tokens: int = 1
    max_output_tokens: int = 1 << 20
    num_prompt_tokens: int = 100


class Bench:
    def __init__(self) -> None:
        self.perf = PerfModel(CONFIG)
        self.decoding: dict[WorkerId, Decoding] = {}
        self.foresight = Foresight(
            self.perf,
            decoding=self.decoding.get,
            num_computing=lambda model: 3,
            expected_output_tokens=256,
        )
        self.now_s = 0.0

    def prospect(self, batch: int = 20, *, ttft_s: float = 0.5, itl_target_s: float | None = None):
        self.now_s += 1.0
        predicted = Prediction(ttft_s, self.perf.itl_s(Role.DECODE, batch, 0, D0))
        terms = [
            ScoreTerms(worker_id, role, 0, 100, 0, 0, batch, 0, 0.0, 0.0)
            for worker_id, role in ((P0, Role.PREFILL), (D0, Role.DECODE))
        ]
        placement = Placement(
            PlacementKind.REMOTE_PREFILL, P0, D0, 0.0, "", terms, predicted=predicted
        )
        ticket = Ticket("a", 1.0, targets=SloTargets(1.0, itl_target_s), num_prompt_tokens=100)
        return self.foresight.prospect(MODEL, ticket, placement, self.now_s)


def test_alone_with_the_model_it_is_what_the_placement_predicts():
    prospect = Bench().prospect(20)
    assert prospect.predicted.itl_s == pytest.approx(0.03)
    assert prospect.decode == D0 and prospect.num_workers == 3
    assert prospect.places_per_s == 0.0 and prospect.alone_itl_s == 0.0
    assert Bench().prospect(itl_target_s=0.05).alone_itl_s == pytest.approx(0.011, rel=0.01)


def test_sequences_that_will_have_ended_do_not_slow_it_down():
    bench = Bench()
    for left in (5, 5, 5, 5, 500):
        bench.foresight.started(MODEL, D0, Fake(100, 100 + left))
    prospect = bench.prospect(20, ttft_s=0.5)
    assert prospect.predicted.itl_s == pytest.approx(0.026, rel=0.02)
    assert prospect.itl_relief_s == pytest.approx(0.001, rel=0.02)


def test_worker_that_is_slower_than_modelled_is_taken_as_it_is():
    bench = Bench()
    bench.decoding[D0] = Decoding(0.06, 20.0, 0.0)
    assert bench.prospect(20).predicted.itl_s == pytest.approx(0.06, rel=0.1)


def test_places_come_free_on_all_workers_at_their_own_pace():
    bench = Bench()
    for worker_id in (D0, D1):
        for left in range(1, 101):
            bench.foresight.started(MODEL, worker_id, Fake(100, 100 + left))
    bench.decoding[D0] = Decoding(0.1, 100.0, 0.0)
    bench.decoding[D1] = Decoding(0.02, 100.0, 0.0)
    prospect = bench.prospect()
    assert prospect.places_per_s == pytest.approx(10 + 50, rel=0.05)
    assert prospect.num_decoding == 2


def test_decode_steps_are_learned_from_a_batch_that_runs():
    """Nothing has ended; the model would find out many tokens later."""
    bench = Bench()
    for batch in range(1, 40):
        bench.decoding[D0] = Decoding(0.02 + 0.004 * batch, float(batch), 0.0)
        bench.prospect(batch)
    assert bench.perf.itl_s(Role.DECODE, 35, 0, D0) == pytest.approx(0.16, rel=0.15)


def test_one_worker_is_not_learned_from_more_often_than_now_and_then():
    bench = Bench()
    bench.decoding[D0] = Decoding(0.5, 10.0, 0.0)
    bench.prospect()
    num_seen = bench.perf._itl[Role.DECODE].num_seen
    bench.now_s -= 1.0 - LEARN_PERIOD_S / 2
    bench.prospect()
    assert bench.perf._itl[Role.DECODE].num_seen == num_seen == 1


def test_what_was_started_is_followed_to_its_end():
    bench = Bench()
    running = [bench.foresight.started(MODEL, D0, Fake()) for _ in range(10)]
    assert bench.foresight.num_running == 10
    for each in running:
        bench.foresight.ended(each)
    assert bench.foresight.num_running == 0
