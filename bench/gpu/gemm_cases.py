"""Linear layers of decode batches and of prefill, in all weight formats, beside cuBLAS.

Weights are walked over in several copies, so that each call reads them from memory as a real step
does. Quantised products are held against the bytes of their own weights; `x` tells how they
compare with cuBLAS in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import (
    ERROR_LIMITS,
    OURS,
    OURS_PDL,
    Bound,
    Case,
    PlannedCase,
    Scale,
    compiled_peer,
    relative_error,
    worst,
)
from bench.gpu.gemm_inputs import (
    AS_ENGINE,
    BF16,
    FP8,
    RMS_EPS,
    WEIGHT_STD,
    GemmInputs,
    Surroundings,
    Weights,
    cublas_out,
    gemm_inputs,
    torch_layer,
    workspace,
)
from bench.gpu.shapes import LLAMA_3_1_8B
from bench.gpu.timing import Call
from kernels.fp8_gemm import quantize_fp8_rows, quantize_fp8_rows_reference

SKINNY = "skinny-gemm"
WEIGHT_ONLY = "weight-only-gemm"
W8A8 = "fp8-gemm"
DECODE_ROWS = (1, 8, 32, 64)
PREFILL_ROWS = (1024, 8192)
SKINNY_MAX_ROWS = 64
"""Rows up to which reading the weights takes longer than multiplying."""
LAYERS = ("gate_up", "down", "qkv", "o", "head")


def skinny_cases(scale: Scale) -> Iterator[PlannedCase]:
    """bfloat16 at every linear shape of Llama-3.1-8B, then with what the engine fuses."""
    for rows in DECODE_ROWS:
        for layer in LAYERS:
            yield _planned(scale, SKINNY, Weights.BF16, layer, rows)
    for rows in (1, 8, 64):
        for layer in ("gate_up", "o"):
            yield _planned(scale, SKINNY, Weights.BF16, layer, rows, AS_ENGINE[layer])


def weight_only_cases(scale: Scale) -> Iterator[PlannedCase]:
    kinds = (Weights.INT8, Weights.INT4_128, Weights.FP8)
    for rows in DECODE_ROWS:
        for kind in kinds:
            for layer in LAYERS:
                yield _planned(scale, WEIGHT_ONLY, kind, layer, rows)
    for rows in PREFILL_ROWS:
        for kind in kinds:
            for layer in ("gate_up", "down"):
                yield _planned(scale, WEIGHT_ONLY, kind, layer, rows)
    for rows in (*DECODE_ROWS, *PREFILL_ROWS):
        yield _planned(scale, WEIGHT_ONLY, Weights.INT4_64, "gate_up", rows)


def fp8_cases(scale: Scale) -> Iterator[PlannedCase]:
    """Products of quantised activations, and the quantisation before them."""
    for rows in (*PREFILL_ROWS, *DECODE_ROWS):
        for layer in LAYERS:
            if rows <= SKINNY_MAX_ROWS or layer != "head":
                yield _planned(scale, W8A8, Weights.W8A8, layer, rows)
    for rows in (1, 64, 8192):
        name = f"quantize rows {rows} x 4096 normalised"
        size = scale.upto(rows, 5), scale.upto(4096, 256)
        yield PlannedCase(W8A8, name, partial(_quantize_case, scale, name, *size))


def gemm_name(kind: Weights, layer: str, n: int, k: int, rows: int) -> str:
    return f"{kind.value} {layer} {n} x {k}, {rows} rows"


def _planned(
    scale: Scale,
    group: str,
    kind: Weights,
    layer: str,
    rows: int,
    around: Surroundings | None = None,
) -> PlannedCase:
    n, k = LLAMA_3_1_8B.linears[layer]
    name = gemm_name(kind, layer, n, k, rows) + (" as in the engine" if around else "")
    size = scale.upto(rows, 70), scale.upto(n, 192), scale.upto(k, 512)
    return PlannedCase(group, name, partial(gemm_case, scale, group, name, kind, *size, around))


def gemm_case(
    scale: Scale,
    group: str,
    name: str,
    kind: Weights,
    num_rows: int,
    n: int,
    k: int,
    around: Surroundings | None = None,
) -> Case:
    """x [num_rows, k] times a weight of `n` rows."""
    weight_bytes = kind.num_bytes(n, k)
    shared = workspace(scale)
    inputs = [
        gemm_inputs(scale, kind, shared, num_rows, n, k, around)
        for _ in range(scale.num_input_sets(int(weight_bytes)))
    ]
    contenders: dict[str, list[Call]] = {OURS: [one.run for one in inputs]}
    if num_rows <= SKINNY_MAX_ROWS:
        contenders[OURS_PDL] = [partial(one.run, launch_pdl=True) for one in inputs]
    if scale.has_peers:
        contenders |= _peers(scale, inputs, n, k, around)
    first = inputs[0]

    def error() -> float:
        # Where nothing launches dependently the second result would be the first again.
        if scale.is_tiny or OURS_PDL not in contenders:
            return first.error()
        return worst((first.error(), first.error(launch_pdl=True)))

    x_bytes = first.x.numel() * first.x.element_size()
    residual_bytes = 0 if first.residual is None else 2 * first.residual.numel()
    is_w8a8 = kind is Weights.W8A8
    bound = Bound.FP8_MATMUL if is_w8a8 else Bound.MATMUL
    return Case(
        group=group,
        name=name,
        num_bytes=weight_bytes + x_bytes + residual_bytes + 2 * first.out.numel(),
        flops=2.0 * num_rows * n * k,
        bound=Bound.READ if num_rows <= SKINNY_MAX_ROWS else bound,
        contenders=contenders,
        error=error,
        error_limit=ERROR_LIMITS[BF16],
    )


def _peers(
    scale: Scale, inputs: list[GemmInputs], n: int, k: int, around: Surroundings | None
) -> dict[str, list[Call]]:
    """cuBLAS in bfloat16 on weights of its own, as many bytes as keep them out of the cache."""
    num_rows = inputs[0].x.shape[0]
    weights = [one.weight for one in inputs]
    if inputs[0].kind is not Weights.BF16:
        weights = [scale.randn(n, k) * WEIGHT_STD for _ in range(scale.num_input_sets(2 * n * k))]
    xs = [scale.randn(num_rows, k) for _ in weights]
    if around is not None:
        residuals = [one.residual for one in inputs]
        layers = [
            partial(torch_layer, x, weight, around, residual)
            for x, weight, residual in zip(xs, weights, residuals, strict=True)
        ]
        peers: dict[str, list[Call]] = {"torch": list(layers)}
        if scale.device.type == "cuda":
            layer = compiled_peer(torch_layer)
            peers["torch.compile"] = [partial(layer, *one.args) for one in layers]
        return peers
    outs = [torch.empty(num_rows, n, device=scale.device, dtype=BF16) for _ in weights]
    peers = {"cublas": [partial(cublas_out, *one) for one in zip(xs, weights, outs, strict=True)]}
    if inputs[0].kind is Weights.W8A8:
        peers["torch._scaled_mm"] = [_scaled_mm(one) for one in inputs]
    return peers


def _scaled_mm(inputs: GemmInputs) -> Call:
    assert inputs.x_scale is not None and inputs.weight_scale is not None
    options: dict[str, Any] = {
        "scale_a": inputs.x_scale[:, None],
        "scale_b": inputs.weight_scale[None, :],
        "out_dtype": BF16,
        "use_fast_accum": False,
    }
    return lambda: torch._scaled_mm(inputs.x, inputs.weight.t(), **options)


def _quantize_case(scale: Scale, name: str, num_rows: int, k: int) -> Case:
    num_bytes = num_rows * k * (BF16.itemsize + FP8.itemsize) + 4 * num_rows
    xs = [scale.randn(num_rows, k) for _ in range(scale.num_input_sets(num_bytes))]
    contenders: dict[str, list[Call]] = {
        OURS: [partial(quantize_fp8_rows, x, rms_eps=RMS_EPS) for x in xs]
    }
    if scale.has_peers:
        eager = quantize_fp8_rows_reference
        contenders["torch"] = [partial(eager, x, rms_eps=RMS_EPS) for x in xs]
        if scale.device.type == "cuda":
            fused = compiled_peer(eager)
            contenders["torch.compile"] = [partial(fused, x, rms_eps=RMS_EPS) for x in xs]

    def widened(quantized: tuple[Tensor, Tensor]) -> Tensor:
        x_fp8, x_scale = quantized
        return x_fp8.float() * x_scale[:, None]

    def error() -> float:
        expected = quantize_fp8_rows_reference(xs[0], rms_eps=RMS_EPS)
        return relative_error(widened(quantize_fp8_rows(xs[0], rms_eps=RMS_EPS)), widened(expected))

    return Case(
        group=W8A8,
        name=name,
        num_bytes=num_bytes,
        flops=4.0 * num_rows * k,
        bound=Bound.COPY,
        contenders=contenders,
        error=error,
        error_limit=ERROR_LIMITS[BF16],
    )
