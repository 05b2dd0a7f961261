"""y = x W^T for the few rows of a decode batch, at the speed the weights can be read.

    y[m, n] = f(sum_k x[m, k] W[n, k] * rstd[m] + bias[n]) + residual[m, n]

Shapes: x [M, K], M 1-64, rows may be apart; W [N, K] row-major; bias [N]; residual and y [M, N].
bfloat16, float16 or float32, all alike. f is the identity or SwiGLU (W holds gate rows, then up
rows, and y has half as many columns); rstd = rsqrt(mean(x^2) + rms_eps) is RMSNorm whose gain is
folded into W.

Bytes: N K itemsize + M (K + N) itemsize (the first term decides); FLOPs: 2 M N K. Bound: reading
the weights once. Split-K adds 8 M N num_splits bytes, which stay in L2.
Source: RMSNorm, https://arxiv.org/abs/1910.07467; SwiGLU, https://arxiv.org/abs/2002.05202;
split-K with the last program adding, https://arxiv.org/abs/2402.00025.

Assumes contiguous rows; runs at speed when rows start at multiples of 16 bytes. N K and M K may
pass 2^31. Does not know which layer it computes.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.gemm_epilogue import Epilogue, finish_reference
from kernels.gemm_launch import (
    NUM_PROGRAMS_TO_FILL,
    GemmWorkspace,
    Tile,
    check_dtype,
    check_input,
    check_operand,
    launch_gemm,
    num_splits_to_fill,
    prepare_out,
)
from kernels.platform import runs_triton

MAX_NUM_ROWS = 64
GEMV_MAX_NUM_ROWS = 2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def skinny_gemm_reference(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rms_eps: float | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The same in float32 torch, rounded once at the end."""
    epilogue = Epilogue(bias, residual, rms_eps, swiglu)
    out = prepare_out(x, weight.shape[0], epilogue, out, x.dtype)
    return finish_reference(x.float() @ weight.float().T, x, epilogue, out)


def tile_for(num_rows: int, n: int, k: int, *, itemsize: int) -> Tile:
    """The tile for M = `num_rows`, N = `n` rows of the weight and K = `k`."""
    if num_rows <= GEMV_MAX_NUM_ROWS:
        return _gemv_tile(num_rows, n, itemsize)
    if itemsize == 4:
        # float32 is multiplied outside the tensor cores, in registers: small tiles.
        return Tile(16, 32, 32, num_warps=4, num_stages=2)
    block_m = max(8, triton.next_power_of_2(num_rows))
    if n >= 128 * NUM_PROGRAMS_TO_FILL and block_m in (8, 64):
        return Tile(block_m, 128, 64, num_warps=4, num_stages=4)
    if block_m == 64:
        num_splits = num_splits_to_fill(triton.cdiv(n, 64), k, 128, num_programs=240)
        return Tile(block_m, 64, 128, num_warps=4, num_stages=3, num_splits=num_splits)
    if block_m == 8 and n > 4096:
        num_splits = num_splits_to_fill(triton.cdiv(n, 128), k, 64, num_programs=260)
        return Tile(block_m, 128, 64, num_warps=4, num_stages=3, num_splits=num_splits)
    num_splits = num_splits_to_fill(triton.cdiv(n, 64), k, 128)
    return Tile(block_m, 64, 128, num_warps=4, num_stages=4, num_splits=num_splits)


def _gemv_tile(num_rows: int, n: int, itemsize: int) -> Tile:
    """Four 16-byte loads of weights a thread; fewer rows where N has too few for all processors."""
    block_k = 2048 // itemsize
    block_n = 2 if num_rows > 2 or n < 2048 else 4
    return Tile(triton.next_power_of_2(num_rows), block_n, block_k, num_warps=4, uses_dot=False)


def candidate_tiles(num_rows: int, n: int, k: int, *, itemsize: int) -> list[Tile]:
    """Tiles worth timing for a shape, the table's own first."""
    tiles = [tile_for(num_rows, n, k, itemsize=itemsize)]
    if num_rows <= 4:
        tiles += [
            Tile(triton.next_power_of_2(num_rows), block_n, block_k, num_warps, uses_dot=False)
            for block_n in (2, 4, 8, 16)
            for block_k in (512, 1024, 2048)
            for num_warps in (2, 4, 8)
            if 16 <= block_n * block_k * itemsize // (32 * num_warps) <= 128
        ]
    if itemsize < 4:
        block_m = max(8, triton.next_power_of_2(num_rows))
        tiles += [
            Tile(block_m, block_n, block_k, 4, num_stages, num_splits)
            for block_n in (64, 128)
            for block_k in (64, 128, 256)
            for num_stages in (3, 4, 6)
            for num_splits in (1, 2, 3, 4, 6, 8)
            if (block_n + block_m) * block_k * itemsize * num_stages <= 200 * 1024
            and num_splits * block_k <= k
        ]
    return list(dict.fromkeys(tiles))


def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rms_eps: float | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
    workspace: GemmWorkspace | None = None,
    tile: Tile | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """y [M, N], or [M, N/2] with swiglu, of x [M, K] and weight [N, K] in x's dtype.

    `out` may be `residual` itself. `workspace` serves every launch of a stream in turn; without
    one, shapes that split K allocate theirs. `tile` overrides the table, for tuning.

    Raises: ValueError for shapes, dtypes, devices or strides the kernel does not serve.
    """
    check_input(x, DTYPES)
    check_operand("weight", weight, (weight.shape[0], x.shape[1]), x.device)
    check_dtype("weight", weight, (x.dtype,))
    epilogue = Epilogue(bias, residual, rms_eps, swiglu)
    out = prepare_out(x, weight.shape[0], epilogue, out, x.dtype)
    num_rows = x.shape[0]
    if num_rows > MAX_NUM_ROWS:
        raise ValueError(
            f"x has {num_rows} rows, skinny_gemm serves {MAX_NUM_ROWS}; "
            "use torch.nn.functional.linear"
        )
    if out.numel() == 0:
        return out
    if not runs_triton(x):
        return skinny_gemm_reference(
            x, weight, bias=bias, residual=residual, rms_eps=rms_eps, swiglu=swiglu, out=out
        )
    if tile is None:
        itemsize = x.element_size()
        tile = tile_for(num_rows, weight.shape[0], x.shape[1], itemsize=itemsize)
    launch_gemm(x, weight, out, epilogue, tile, workspace=workspace, launch_pdl=launch_pdl)
    return out
