"""W8A8: e4m3 weights times e4m3 activations on the fp8 tensor cores, and the quantisation of rows.

    quantize_fp8_rows   scale[m] = max_k |x[m, k]| / 448,  x_fp8[m, k] = x[m, k] / scale[m]
    fp8_gemm            y[m, n] = f(sum_k x_fp8[m, k] W[n, k] x_scale[m] w_scale[n] + bias[n])
                                  + residual[m, n]

With rms_eps the rows are normalised first; that only changes their scale, by
rsqrt(mean(x^2) + rms_eps).

Shapes: x [M, K] bfloat16, float16 or float32, any M; x_fp8 [M, K], x_scale [M] float32; W [N, K]
float8_e4m3fn, w_scale [N]; y and residual [M, N]. f is the identity or SwiGLU.

Bytes: quantisation M K (itemsize + 1); product N K + M K + M N itemsize. FLOPs: 2 M N K.
Bound: reading the weights up to about 64 rows; beyond, the fp8 tensor cores, twice bfloat16's
rate. Hopper adds fp8 products with about 14 bits; each BLOCK_K of them is moved to float32
registers, unless fast_accumulation trades that for speed.
For large M `torch._scaled_mm` with row-wise scales computes the same and may be picked instead.
Source: fp8 formats, https://arxiv.org/abs/2209.05433; accumulation, https://arxiv.org/abs/2412.19437
section 3.3.2.

Assumes contiguous rows, K up to 65536 in quantisation; M K and N K may pass 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.gemm_epilogue import Epilogue, finish_reference
from kernels.gemm_launch import (
    GemmWorkspace,
    Tile,
    check_dtype,
    check_input,
    check_operand,
    launch_gemm,
    num_splits_to_fill,
    prepare_out,
)
from kernels.platform import is_interpreted, runs_triton

E4M3_MAX = 448.0
SMALLEST_MAX = 1e-12
"""A row whose largest value is below this is divided by it instead, so that zeros stay zeros."""

MAX_QUANTIZED_WIDTH = 65536
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_fp8_rows_reference(
    x: Tensor, *, rms_eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same in float32 torch."""
    x_32 = x.float()
    largest = x_32.abs().amax(dim=-1).clamp_min(SMALLEST_MAX)
    x_fp8 = (x_32 * (E4M3_MAX / largest)[:, None]).clamp(-E4M3_MAX, E4M3_MAX)
    scale = largest / E4M3_MAX
    if rms_eps is not None:
        scale = scale * torch.rsqrt(x_32.square().mean(dim=-1) + rms_eps)
    return x_fp8.to(torch.float8_e4m3fn), scale


@triton.jit
def _quantize_fp8_rows_kernel(
    x_ptr,  # [M, K]
    x_fp8_ptr,  # [M, K]
    scale_ptr,  # [M]
    stride_xm: tl.int64,
    stride_qm: tl.int64,
    K,
    rms_eps,
    SMALLEST_MAX: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_RMS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)  # [BLOCK_K]
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST_MAX)
    scaled = tl.clamp(x * (448.0 / largest), -448.0, 448.0)
    tl.store(x_fp8_ptr + row * stride_qm + k, scaled.to(tl.float8e4nv), mask=k < K)
    scale = largest / 448.0
    if HAS_RMS:
        scale *= tl.rsqrt(tl.sum(x * x, axis=0) / K + rms_eps)
    tl.store(scale_ptr + row, scale)


def quantize_fp8_rows(
    x: Tensor, *, rms_eps: float | None = None, launch_pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(x_fp8 [M, K] float8_e4m3fn, scale [M] float32) with x (normalised) = x_fp8 * scale.

    Raises: ValueError for shapes, dtypes or strides the kernel does not serve.
    """
    check_input(x, INPUT_DTYPES)
    num_rows, k = x.shape
    if k > MAX_QUANTIZED_WIDTH:
        raise ValueError(f"rows have {k} values, one program holds {MAX_QUANTIZED_WIDTH}")
    if num_rows and not runs_triton(x):
        return quantize_fp8_rows_reference(x, rms_eps=rms_eps)
    x_fp8 = torch.empty((num_rows, k), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return x_fp8, scale
    uses_pdl = launch_pdl and not is_interpreted()
    block_k = triton.next_power_of_2(k)
    _quantize_fp8_rows_kernel[(num_rows,)](
        x,
        x_fp8,
        scale,
        x.stride(0),
        x_fp8.stride(0),
        k,
        0.0 if rms_eps is None else rms_eps,
        SMALLEST_MAX=SMALLEST_MAX,
        BLOCK_K=block_k,
        HAS_RMS=rms_eps is not None,
        USE_PDL=uses_pdl,
        num_warps=max(4, min(32, block_k // 1024)),
        launch_pdl=uses_pdl,
    )
    return x_fp8, scale


def fp8_gemm_reference(
    x_fp8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The same in float32 torch, rounded once at the end."""
    epilogue = Epilogue(bias, residual, None, swiglu)
    out = prepare_out(x_fp8, weight.shape[0], epilogue, out, out_dtype)
    product = x_fp8.float() @ weight.float().T
    product = product * x_scale.float()[:, None] * weight_scale.float()[None, :]
    return finish_reference(product, x_fp8, epilogue, out)


def tile_for(num_rows: int, n: int, k: int) -> Tile:
    """The tile for M = `num_rows`, N = `n` rows of the weight and K = `k`."""
    if num_rows > 64:
        return Tile(128, 128, 128, num_warps=8, num_stages=4)
    # The fp8 tensor cores take 16 rows at least, and 64 of the weight's.
    block_m = max(16, triton.next_power_of_2(num_rows))
    block_n = 64 if block_m <= 32 else 128
    num_splits = num_splits_to_fill(triton.cdiv(n, block_n), k, 256)
    return Tile(block_m, block_n, 256, num_warps=4, num_stages=4, num_splits=num_splits)


def candidate_tiles(num_rows: int, n: int, k: int) -> list[Tile]:
    """Tiles worth timing for a shape, the table's own first."""
    tiles = [tile_for(num_rows, n, k)]
    if num_rows > 64:
        shapes = [(128, 64, 4), (128, 128, 4), (128, 128, 8), (256, 64, 8), (256, 128, 8)]
        splits: tuple[int, ...] = (1,)
    else:
        block_m = max(16, triton.next_power_of_2(num_rows))
        shapes = [(block_m, 64, 4), (block_m, 128, 4), (block_m, 128, 8)]
        splits = (1, 2, 3, 4, 6, 8)
    tiles += [
        Tile(block_m, block_n, block_k, num_warps, num_stages, num_splits)
        for block_m, block_n, num_warps in shapes
        for block_k in (128, 256)
        for num_stages in (3, 4, 5, 6)
        for num_splits in splits
        if (block_n + block_m) * block_k * num_stages <= 200 * 1024 and num_splits * block_k <= k
    ]
    return list(dict.fromkeys(tiles))


def fp8_gemm(
    x_fp8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    fast_accumulation: bool = False,
    workspace: GemmWorkspace | None = None,
    tile: Tile | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """y [M, N], or [M, N/2] with swiglu, in `out_dtype`.

    `out` may be `residual` itself. `workspace` and `tile` as in `skinny_gemm`.

    Raises: ValueError for shapes, dtypes, devices or strides the kernel does not serve.
    """
    check_input(x_fp8, (torch.float8_e4m3fn,))
    check_dtype("weight", weight, (torch.float8_e4m3fn,))
    check_operand("weight", weight, (weight.shape[0], x_fp8.shape[1]), x_fp8.device)
    check_operand("x_scale", x_scale, (x_fp8.shape[0],), x_fp8.device)
    check_operand("weight_scale", weight_scale, (weight.shape[0],), x_fp8.device)
    epilogue = Epilogue(bias, residual, None, swiglu)
    out = prepare_out(x_fp8, weight.shape[0], epilogue, out, out_dtype)
    if out.numel() == 0:
        return out
    if not runs_triton(x_fp8):
        return fp8_gemm_reference(
            x_fp8,
            x_scale,
            weight,
            weight_scale,
            bias=bias,
            residual=residual,
            swiglu=swiglu,
            out_dtype=out_dtype,
            out=out,
        )
    if tile is None:
        tile = tile_for(x_fp8.shape[0], weight.shape[0], x_fp8.shape[1])
    launch_gemm(
        x_fp8,
        weight,
        out,
        epilogue,
        tile,
        column_scale=weight_scale,
        row_scale=x_scale,
        workspace=workspace,
        fast_accumulation=fast_accumulation,
        launch_pdl=launch_pdl,
    )
    return out
