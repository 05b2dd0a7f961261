from __future__ import annotations

import random

import pytest

from baton.core.worker_info import Role, WorkerId
from services.router.placement.perf_config import PerfConfig
from services.router.placement.perf_model import MAX_OVERHEAD_S, PerfModel, Quantity

P, D = Role.PREFILL, Role.DECODE
P0, D0 = WorkerId("p0"), WorkerId("d0")


def test_starts_from_what_is_assumed():
    perf, config = PerfModel(), PerfConfig()
    assert perf.prefill_s(P, 1000) == pytest.approx(
        config.prefill_fixed_s + 1000 * config.prefill_token_s + 500_000 * config.prefill_pair_s
    )
    assert perf.itl_s(D, 10, 5000) == pytest.approx(
        config.itl_fixed_s + 10 * config.itl_sequence_s + 5000 * config.itl_kv_token_s
    )
    assert perf.queue_s(P, 1000) == pytest.approx(1000 * config.prefill_token_s)


def test_cached_tokens_cost_the_attention_to_them():
    perf = PerfModel()
    assert perf.prefill_s(P, 100) < perf.prefill_s(P, 100, 8000) < perf.prefill_s(P, 8100)


def test_learns_prefill_by_role_and_worker():
    perf, rng = PerfModel(), random.Random(1)
    slow = WorkerId("p1")
    for _ in range(400):
        n = rng.randrange(50, 8000)
        perf.observe_prefill(P, P0, n, 0, 0.02 + 200e-6 * n)
        perf.observe_prefill(P, slow, n, 0, 1.5 * (0.02 + 200e-6 * n))
    assert perf.prefill_s(P, 4000, 0, slow) / perf.prefill_s(P, 4000, 0, P0) == pytest.approx(
        1.5, rel=0.1
    )
    assert perf.prefill_s(P, 4000, 0, P0) == pytest.approx(0.82, rel=0.1)
    assert perf.error_ratio(Quantity.PREFILL, P) < 0.4


def test_role_nothing_is_known_of_is_as_slow_as_the_other():
    """Or every prompt would go to the decode workers of a slow machine."""
    perf = PerfModel()
    for _ in range(40):
        perf.observe_prefill(P, P0, 1000, 0, 20 * PerfModel().prefill_s(P, 1000))
    assert perf.prefill_s(D, 1000) == pytest.approx(perf.prefill_s(P, 1000), rel=0.1)
    for _ in range(40):
        perf.observe_prefill(D, D0, 1000, 0, 5 * PerfModel().prefill_s(P, 1000))
    assert perf.prefill_s(D, 1000) < perf.prefill_s(P, 1000) / 2


def test_learns_the_decode_step_from_batch_and_kv():
    perf, rng = PerfModel(), random.Random(2)
    for _ in range(1500):
        batch, kv = rng.randrange(1, 128), rng.randrange(1000, 500_000)
        perf.observe_itl(D, D0, batch, kv, 0.012 + 80e-6 * batch + 60e-9 * kv)
    for batch, kv in ((1, 2000), (64, 300_000), (120, 10_000)):
        truth = 0.012 + 80e-6 * batch + 60e-9 * kv
        assert perf.itl_s(D, batch, kv, D0) == pytest.approx(truth, rel=0.1)


def test_learns_how_long_queues_take():
    perf = PerfModel()
    for _ in range(300):
        perf.observe_queue(P, P0, 10_000, 2 * 10_000 * PerfConfig().prefill_token_s)
    assert perf.queue_s(P, 10_000) == pytest.approx(1.0, rel=0.1)
    # A step that was at work says nothing of the rate.
    for _ in range(300):
        perf.observe_queue(P, P0, 10, 5.0)
    assert perf.queue_s(P, 10_000) == pytest.approx(1.0, rel=0.1)
    for _ in range(3000):
        perf.observe_queue(P, P0, 300, 1e9)
    assert perf.queue_s(P, 1000) <= 10.01 * 1000 * PerfConfig().prefill_token_s


def test_first_tokens_tell_what_is_left_out():
    perf = PerfModel()
    for _ in range(400):
        perf.observe_ttft(P, 0.1 + perf.overhead_s, 0.12)
    assert perf.overhead_s == pytest.approx(0.02, rel=0.1)
    assert perf.error_ratio(Quantity.TTFT, P) < 0.05
    for _ in range(10_000):
        perf.observe_ttft(P, 0.1, 1e6)
    assert perf.overhead_s == MAX_OVERHEAD_S
    for _ in range(10_000):
        perf.observe_ttft(P, 5.0, 0.001)
    assert perf.overhead_s == 0.0


def test_version_follows_what_is_learned():
    perf = PerfModel()
    before = perf.version
    perf.observe_prefill(P, P0, 0, 100, 1.0)
    perf.observe_prefill(P, P0, 10, 0, 0.0)
    perf.observe_itl(D, D0, 0, 0, 1.0)
    assert perf.version == before
    perf.observe_itl(D, D0, 3, 100, 0.01)
    assert perf.version > before
