"""Decode and prefill speed of the whole engine on a GPU, with random weights of real shapes.

    python -m bench.engine [--models llama-3.1-8b,...] [--weights bf16,int8,int4,fp8]
                           [--budget-s N] [--out DIR]

Every line gives ours, the share of the card's own limit measured in this run (copy bandwidth for
decode: bytes of the linear weights x steps/s; matmul peak for prefill) and, for Llama-3.1-8B in
bfloat16, what vLLM reached on the same kind of card (bench/gpu/peers.py). The JSON goes to
bench/results/ or --out. Points that the budget leaves no time for are listed as skipped.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baton.core.clock import WallClock
from baton.core.quantization import (
    QuantizationConfig,
    Scheme,
    quantization_json,
    weight_scheme,
)
from baton.engine.config import Device, EngineConfig, LoadFormat
from baton.engine.factory import build_engine
from bench import machine
from bench.gpu.ceilings import Ceilings, measure_ceilings
from bench.gpu.engine_goals import evaluate_engine
from bench.gpu.engine_points import DecodePoint, EngineDriver, PrefillPoint, TooFewRunning
from bench.gpu.engine_results import ModelResult
from bench.gpu.peers import (
    GPT_FAST_DECODE_TOKENS_PER_S,
    VLLM_DECODE_TOKENS_PER_S,
    VLLM_PREFILL_TOKENS_PER_S,
)
from bench.gpu.report import ceilings_line
from bench.gpu.shapes import SHAPES, ModelShape
from bench.gpu.step_profile import StepProfile, profile_steps

WEIGHTS: dict[str, QuantizationConfig | None] = {
    "bf16": None,
    "fp8": QuantizationConfig(Scheme.FP8),
    "fp8-weight": QuantizationConfig(Scheme.FP8_WEIGHT),
    "int8": QuantizationConfig(Scheme.INT8),
    "int4": QuantizationConfig(Scheme.INT4, group_size=128),
}
DECODE_POINTS = (
    (1, 128),
    (8, 1024),
    (32, 1024),
    (64, 1024),
    (128, 1024),
    (256, 1024),
    (1, 8192),
    (32, 4096),
    (64, 4096),
    (1, 32768),
)
PREFILL_POINTS = (
    (1, 1024),
    (1, 8192),
    (1, 30000),
    (1, 512),
    (1, 128),
    (1, 2048),
    (4, 2048),
    (8, 8192),
)
DECODE_STEPS = 64
PREFILL_ROUNDS = 3


class Budget:
    """Time that is left; a point starts only when it can be expected to end in time."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    def allows(self, expected_s: float) -> bool:
        return time.monotonic() + expected_s < self._end_s


def engine_config(folder: Path) -> EngineConfig:
    return EngineConfig(
        model_path=folder,
        device=Device.CUDA,
        load_format=LoadFormat.DUMMY,
        block_size=64,
        max_model_len=None,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
    )


def linear_weight_bytes(shape: ModelShape, quantization: QuantizationConfig | None) -> float:
    """Bytes that a decode step reads of the projections and the head."""
    head = shape.vocab_size * shape.hidden_size
    projections = shape.num_linear_weights - head
    scheme = weight_scheme(quantization)
    if quantization is None or scheme is None:
        return 2.0 * (projections + head)
    bits = scheme.num_bits
    scales = 0.0 if quantization.group_size is None else 2.0 / quantization.group_size
    return projections * (bits / 8 + scales) + 2.0 * head


def measure_model(shape: ModelShape, weights: str, budget: Budget) -> ModelResult:
    """Build the engine, measure all points that the budget allows, take it down."""
    quantization = WEIGHTS[weights]
    changes: dict[str, Any] = {}
    if quantization is not None:
        changes["quantization_config"] = quantization_json(quantization)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        config = engine_config(shape.write_config(Path(folder) / shape.name, **changes))
        engine = build_engine(config, clock=WallClock()).engine
        result = ModelResult(
            shape.name,
            weights,
            start_s=time.perf_counter() - start,
            weight_bytes=linear_weight_bytes(shape, quantization),
        )
    driver = EngineDriver(engine, shape.vocab_size)
    driver.measure_decode(1, 64, 4)
    result.profile = _profile(driver)
    for batch_size, context in _fitting(DECODE_POINTS, shape):
        expected_s = 2.0 + batch_size * context / 10_000
        name = f"decode {batch_size} x {context}"
        if not budget.allows(expected_s):
            result.skipped.append(f"{name}: no time left")
            continue
        try:
            result.decode.append(driver.measure_decode(batch_size, context, DECODE_STEPS))
        except TooFewRunning as reason:
            result.skipped.append(f"{name}: {reason}")
    for num_prompts, length in _fitting(PREFILL_POINTS, shape):
        expected_s = (1 + PREFILL_ROUNDS) * num_prompts * length / 20_000
        if budget.allows(expected_s):
            result.prefill.append(_median_prefill(driver, num_prompts, length))
        else:
            result.skipped.append(f"prefill {num_prompts} x {length}: no time left")
    if not engine.is_empty:
        raise RuntimeError("the engine still holds requests after its last point")
    return result


def _fitting(points: tuple[tuple[int, int], ...], shape: ModelShape) -> Iterator[tuple[int, int]]:
    """Points whose sequences the model can hold."""
    for count, length in points:
        if length + 512 <= shape.max_position_embeddings:
            yield count, length


def _profile(driver: EngineDriver) -> StepProfile:
    request_ids = driver.submit(1, 128, 200)
    driver.run_until_first_tokens(request_ids)
    driver.steps(16)
    profile = profile_steps(lambda: driver.steps(32), 32)
    driver.finish(request_ids)
    return profile


def _median_prefill(driver: EngineDriver, num_prompts: int, length: int) -> PrefillPoint:
    driver.measure_prefill(num_prompts, length)
    rounds = [driver.measure_prefill(num_prompts, length) for _ in range(PREFILL_ROUNDS)]
    return sorted(rounds, key=lambda point: point.total_s)[PREFILL_ROUNDS // 2]


def _return_gpu_memory() -> None:
    """To the driver, once nothing refers to the last engine any more."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def decode_row(result: ModelResult, point: DecodePoint, ceilings: Ceilings) -> str:
    share = result.weight_bytes / point.step_s / ceilings.copy_bytes_per_s
    peer = _peer(result, VLLM_DECODE_TOKENS_PER_S.get(point.key))
    gpt_fast = GPT_FAST_DECODE_TOKENS_PER_S.get((result.model, result.weights))
    is_gpt_fasts = gpt_fast is not None and point.key == (1, 128)
    return (
        f"decode  {point.batch_size:4} x {point.context:<6} {point.tokens_per_s:10.1f} tokens/s "
        f"{point.step_s * 1e3:8.2f} ms  weights {share:6.1%} of copy"
        + ("" if peer is None else f"  vLLM {peer:,.0f} (x{point.tokens_per_s / peer:.2f})")
        + (f"  gpt-fast {gpt_fast:,.0f}" if is_gpt_fasts else "")
    )


def prefill_row(result: ModelResult, point: PrefillPoint, ceilings: Ceilings) -> str:
    shape = SHAPES[result.model]
    flops = point.num_prompts * shape.prefill_flops(point.length)
    share = flops / point.total_s / ceilings.bf16_flops_per_s
    peer = _peer(result, VLLM_PREFILL_TOKENS_PER_S.get(point.key))
    return (
        f"prefill {point.num_prompts:4} x {point.length:<6} {point.tokens_per_s:10.0f} tokens/s "
        f"{point.total_s * 1e3:8.1f} ms  {share:6.1%} of matmul peak"
        + ("" if peer is None else f"  vLLM {peer:,.0f} (x{point.tokens_per_s / peer:.2f})")
    )


def _peer(result: ModelResult, tokens_per_s: float | None) -> float | None:
    is_peers = result.model == "llama-3.1-8b" and result.weights == "bf16"
    return tokens_per_s if is_peers else None


def print_result(result: ModelResult, ceilings: Ceilings) -> None:
    print(f"\n{result.model} {result.weights}: ready in {result.start_s:.1f} s")
    if result.profile is not None:
        profile = result.profile
        names = f" {profile.blocking_calls}" if profile.blocking_calls else ""
        print(
            f"one stream: {profile.busy_share:.1%} of the time in kernels, "
            f"{profile.kernels_per_step:.1f} kernels, {profile.blocking_calls_per_step:.2f} "
            f"blocking calls{names} and {profile.event_waits_per_step:.2f} event waits a step"
        )
    for point in result.decode:
        print(decode_row(result, point, ceilings))
    for prefill in result.prefill:
        print(prefill_row(result, prefill, ceilings))
    for name in result.skipped:
        print(f"skipped: {name}")


def main() -> int:
    args = parse_args(sys.argv[1:])
    budget = Budget(args.budget_s)
    ceilings = measure_ceilings()
    print(ceilings_line(ceilings))
    results: list[ModelResult] = []
    for model in args.models.split(","):
        for weights in args.weights.split(","):
            if model != "llama-3.1-8b" and weights != "bf16":
                continue
            results.append(measure_model(SHAPES[model], weights, budget))
            _return_gpu_memory()
            print_result(results[-1], ceilings)
    goals = evaluate_engine(results, ceilings)
    print("\nmust reach")
    for goal in goals:
        print(goal.row())
    where = machine.describe() | machine.describe_gpu()
    stored = {
        "machine": where | ({"commit": args.commit} if args.commit else {}),
        "ceilings": asdict(ceilings),
        "goals": [goal.as_json() for goal in goals],
        "models": [asdict(result) for result in results],
    }
    print(machine.store("engine-gpu", stored, args.out))
    return 0


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default="llama-3.1-8b,llama-3.2-1b,llama-2-7b")
    parser.add_argument(
        "--weights", default="bf16,int8,int4,fp8", help="other than bf16: of llama-3.1-8b alone"
    )
    parser.add_argument("--budget-s", type=float, default=480.0, help="for all points together")
    parser.add_argument(
        "--out", type=Path, default=machine.RESULTS, help="folder for the JSON (%(default)s)"
    )
    parser.add_argument("--commit", help="what the JSON names where git cannot be asked")
    args = parser.parse_args(arguments)
    for name, known in (("models", SHAPES), ("weights", WEIGHTS)):
        unknown = sorted(set(getattr(args, name).split(",")) - set(known))
        if unknown:
            parser.error(f"unknown {name}: {unknown[0]}; known are {', '.join(known)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
