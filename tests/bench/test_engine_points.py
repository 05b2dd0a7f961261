"""The engine benchmark's driver, on the CPU engine, and its arithmetic."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import tiny_llama
from baton.core.clock import WallClock
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from bench.engine import (
    WEIGHTS,
    Budget,
    decode_row,
    linear_weight_bytes,
    parse_args,
    prefill_row,
)
from bench.gpu.ceilings import Ceilings
from bench.gpu.engine_goals import evaluate_engine
from bench.gpu.engine_points import DecodePoint, EngineDriver, PrefillPoint, TooFewRunning
from bench.gpu.engine_results import ModelResult
from bench.gpu.shapes import LLAMA_2_7B, LLAMA_3_1_8B, LLAMA_3_2_1B
from bench.gpu.step_profile import StepProfile, Window, covered, summarise

CEILINGS = Ceilings(4e12, 4.4e12, 800e12)
NOTHING = Window([], Counter())


@pytest.fixture
def driver(tmp_path: Path) -> EngineDriver:
    config = EngineConfig(
        model_path=tiny_llama.write_checkpoint(tmp_path / "m"),
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=32,
        kv_cache_bytes=4 << 20,
        enable_prefix_caching=False,
    )
    return EngineDriver(build_engine(config, clock=WallClock()).engine, 320)


def test_points_are_measured_and_leave_the_engine_empty(driver: EngineDriver) -> None:
    for batch_size in (1, 3, 8):
        point = driver.measure_decode(batch_size, 20, 5)
        assert point.step_s > 0
        assert point.tokens_per_s == pytest.approx(batch_size / point.step_s)
    prefill = driver.measure_prefill(3, 40)
    assert prefill.tokens_per_s == pytest.approx(120 / prefill.total_s)
    assert driver._engine.is_empty


def test_shapes_have_the_published_numbers_of_weights() -> None:
    embedding = LLAMA_3_1_8B.vocab_size * LLAMA_3_1_8B.hidden_size
    assert LLAMA_3_1_8B.num_linear_weights == 8_030_261_248 - embedding - 65 * 4096
    assert LLAMA_3_2_1B.num_linear_weights == 1_235_814_400 - 33 * 2048
    assert LLAMA_2_7B.num_linear_weights == 6_738_415_616 - 32000 * 4096 - 65 * 4096
    assert LLAMA_3_1_8B.kv_bytes_per_token == 131072
    assert linear_weight_bytes(LLAMA_3_1_8B, None) == pytest.approx(15.01e9, rel=1e-3)


def test_quantised_weights_are_counted_with_their_scales() -> None:
    shape = LLAMA_3_1_8B
    head = 2.0 * shape.vocab_size * shape.hidden_size
    projections = shape.num_linear_weights - head / 2
    assert linear_weight_bytes(shape, WEIGHTS["int8"]) == projections + head
    assert linear_weight_bytes(shape, WEIGHTS["int4"]) == projections * (0.5 + 2 / 128) + head


def test_rows_compare_with_the_limit_and_with_the_peer() -> None:
    result = ModelResult("llama-3.1-8b", "bf16", 1.0, 15e9)
    row = decode_row(result, DecodePoint(1, 128, 0.004), CEILINGS)
    assert "250.0 tokens/s" in row and "93.8% of copy" in row and "(x1.20)" in row
    assert "vLLM" not in decode_row(
        ModelResult("llama-2-7b", "bf16", 1.0, 13e9), DecodePoint(1, 128, 0.004), CEILINGS
    )
    flops = LLAMA_3_1_8B.prefill_flops(8192)
    row = prefill_row(result, PrefillPoint(1, 8192, flops / 400e12), CEILINGS)
    assert "50.0% of matmul peak" in row


def test_budget_refuses_what_would_end_too_late() -> None:
    budget = Budget(100.0)
    assert budget.allows(50.0)
    assert not budget.allows(101.0)


def test_unknown_models_and_weights_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--models", "gpt-9"], ["--weights", "bf16,int3"]):
        with pytest.raises(SystemExit):
            parse_args(arguments)
        assert "known are" in capsys.readouterr().err


def test_busy_share_counts_overlapping_kernels_once() -> None:
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.5, 5.6)]) == 4.0
    calls = Counter(cudaEventSynchronize=3, cudaStreamSynchronize=1, cudaLaunchKernel=9)
    steps = Window([(0.0, 2.0), (1.0, 3.0), (4.0, 5.0)], calls)
    profile = summarise(steps, NOTHING, 2)
    assert profile.busy_share == pytest.approx(0.8)
    assert profile.kernels_per_step == 1.5
    assert profile.blocking_calls_per_step == 0.5
    assert profile.blocking_calls == {"cudaStreamSynchronize": 1}
    assert profile.event_waits_per_step == 1.5
    assert summarise(NOTHING, NOTHING, 1).busy_share == 0.0


def test_calls_of_an_empty_window_are_the_profilers_own() -> None:
    idle = Window([], Counter(cudaDeviceSynchronize=2, cudaMalloc=1))
    same = summarise(Window([], Counter(cudaDeviceSynchronize=2)), idle, 4)
    assert same.blocking_calls_per_step == 0.0
    assert same.blocking_calls == {}
    more = summarise(Window([], Counter(cudaDeviceSynchronize=3, cudaFree=1)), idle, 4)
    assert more.blocking_calls_per_step == 0.5
    assert more.blocking_calls == {"cudaDeviceSynchronize": 1, "cudaFree": 1}


def test_a_batch_that_does_not_fit_is_no_point(driver: EngineDriver) -> None:
    """The pool holds 341 blocks of 16 tokens, the batch limit is 8."""
    with pytest.raises(TooFewRunning, match="of 9 sequences"):
        driver.measure_decode(9, 20, 3)
    assert driver._engine.is_empty


def test_goals_are_judged_and_missing_points_are_no_success() -> None:
    plain = ModelResult("llama-3.1-8b", "bf16", 1.0, 15e9)
    plain.decode = [DecodePoint(1, 128, 0.004), DecodePoint(8, 1024, 8 / 1400)]
    plain.profile = StepProfile(32, 0.97, 163.0, 0.0, 1.0)
    int8 = ModelResult("llama-3.1-8b", "int8", 1.0, 8e9, decode=[DecodePoint(1, 128, 0.0026)])
    goals = {goal.text: goal for goal in evaluate_engine([plain, int8], CEILINGS)}
    verdicts = {text: goal.verdict for text, goal in goals.items()}
    assert verdicts["one stream, bf16: linear weights read, share of copy"] == "reached"
    assert verdicts["one stream, bf16: share of the time in kernels"] == "reached"
    assert verdicts["one stream, int8: times bf16"] == "missed"
    assert verdicts["one stream, int4: times bf16"] == "not measured"
    (decode,) = [goal for text, goal in goals.items() if text.startswith("decode")]
    assert (decode.verdict, decode.where) == ("missed", "8 x 1024")
    assert decode.measured == pytest.approx(1400 / 1542)
    assert {goal.verdict for goal in evaluate_engine([], CEILINGS)} == {"not measured"}
