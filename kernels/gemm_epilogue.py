"""What the GEMM kernels do with a finished product, written once: rows and columns are scaled,
bias and SwiGLU applied, the residual added, all in float32 before the one rounding.

    y[m, n] = f(acc[m, n] * row_scale[m] * column_scale[n] + bias[n]) + residual[m, n]

row_scale is rsqrt(mean(x[m]^2) + rms_eps), the scale of a quantised x, or 1. f is the identity or,
with swiglu, silu(gate) * up, where the first half of the weight's rows gives gate, the second up.

Split-K: the programs of one tile add their float32 parts through a workspace. Each writes its
part, counts itself in, and the last to arrive adds all parts in order of k, so that two runs give
the same bits, then resets the count for the next launch.

Does not know how the product was computed or how weights are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What is applied to x W^T before it is rounded and stored."""

    bias: Tensor | None = None
    """[N], or [2 N] with swiglu."""
    residual: Tensor | None = None
    """[M, N], added last; may be the output itself."""
    rms_eps: float | None = None
    """Rows are multiplied by rsqrt(mean(x^2) + rms_eps); None leaves them."""
    swiglu: bool = False


def epilogue_reference(product: Tensor, x: Tensor, epilogue: Epilogue) -> Tensor:
    """Float32 [M, N] of a float32 product [M, N] (or [M, 2 N] with swiglu) of x [M, K]."""
    if epilogue.rms_eps is not None:
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        product = product * torch.rsqrt(mean_square + epilogue.rms_eps)
    if epilogue.bias is not None:
        product = product + epilogue.bias.float()
    if epilogue.swiglu:
        gate, up = product.chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate) * up
    if epilogue.residual is not None:
        product = product + epilogue.residual.float()
    return product


def finish_reference(product: Tensor, x: Tensor, epilogue: Epilogue, out: Tensor) -> Tensor:
    """`epilogue_reference`, rounded into `out`."""
    return out.copy_(epilogue_reference(product, x, epilogue))


@triton.jit
def _scale_columns(acc, columns, in_range, column_scale_ptr, bias_ptr):
    if column_scale_ptr is not None:
        scale = tl.load(column_scale_ptr + columns, mask=in_range, other=0.0)
        acc *= scale.to(tl.float32)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=in_range, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    return acc


@triton.jit
def store_tile(
    acc,  # [BLOCK_N, BLOCK_M] float32: W x^T; with SWIGLU gate rows, then theirs of up
    sum_sq,  # [BLOCK_M] float32: sum of x^2 over k; used with HAS_RMS only
    m,  # [BLOCK_M]
    tile_n,
    column_scale_ptr,  # [N] or [2 N], or None
    row_scale_ptr,  # [M], or None
    bias_ptr,  # [N] or [2 N], or None
    residual_ptr,  # [M, N], or None
    out_ptr,  # [M, N]
    stride_rm,
    stride_om,
    M,
    N,
    K,
    rms_eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RMS: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Scale, add and store one tile; called by the one program that holds the whole sum."""
    m_in_range = m < M
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + m, mask=m_in_range, other=0.0)[None, :]
    if HAS_RMS:
        acc *= tl.rsqrt(sum_sq / K + rms_eps)[None, :]
    if SWIGLU:
        HALF: tl.constexpr = BLOCK_N // 2
        n = tile_n * HALF + tl.arange(0, HALF)
        n_in_range = n < N
        halves = tl.permute(tl.reshape(acc, (2, HALF, BLOCK_M)), (1, 2, 0))
        gate, up = tl.split(halves)
        gate = _scale_columns(gate, n, n_in_range, column_scale_ptr, bias_ptr)
        up = _scale_columns(up, N + n, n_in_range, column_scale_ptr, bias_ptr)
        y = gate * tl.sigmoid(gate) * up
    else:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_in_range = n < N
        y = _scale_columns(acc, n, n_in_range, column_scale_ptr, bias_ptr)
    in_range = n_in_range[:, None] & m_in_range[None, :]
    m_64 = m.to(tl.int64)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + m_64[None, :] * stride_rm + n[:, None]
        y += tl.load(residual_ptrs, mask=in_range, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + m_64[None, :] * stride_om + n[:, None]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=in_range)


@triton.jit
def add_splits(
    acc,  # [BLOCK_N, BLOCK_M] float32, this program's part
    sum_sq,  # [BLOCK_M] float32, this program's part
    part_ptr,  # this tile's parts, [NUM_SPLITS, BLOCK_N * BLOCK_M + BLOCK_M] float32
    counter_ptr,  # this tile's count of programs that have arrived; 0 before and after
    split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_RMS: tl.constexpr,
):
    """(is_last, acc, sum_sq): the sums over all parts, valid where is_last."""
    ACC: tl.constexpr = BLOCK_M * BLOCK_N
    PART: tl.constexpr = ACC + BLOCK_M
    i_m = tl.arange(0, BLOCK_M)
    offsets = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + i_m[None, :]
    own_ptr = part_ptr + split * PART
    tl.store(own_ptr + offsets, acc)
    if HAS_RMS:
        tl.store(own_ptr + ACC + i_m, sum_sq)
    # Every thread's stores come before the one thread's release.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == NUM_SPLITS - 1
    if is_last:
        tl.store(counter_ptr, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        sum_sq = tl.zeros((BLOCK_M,), tl.float32)
        for i in range(NUM_SPLITS):
            # Past L1, which does not see what other multiprocessors wrote.
            acc += tl.load(part_ptr + i * PART + offsets, cache_modifier=".cg")
            if HAS_RMS:
                sum_sq += tl.load(part_ptr + i * PART + ACC + i_m, cache_modifier=".cg")
    return is_last, acc, sum_sq


@triton.jit
def finish_tile(
    acc, sum_sq, m, tile_n, tile, split,
    column_scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr, counters_ptr,
    stride_rm, stride_om, M, N, K, rms_eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr,
    HAS_RMS: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Add the parts of a split tile, and store it."""
    if NUM_SPLITS > 1:
        part_ptr = parts_ptr + tile.to(tl.int64) * (NUM_SPLITS * (BLOCK_M * BLOCK_N + BLOCK_M))
        is_last, acc, sum_sq = add_splits(
            acc, sum_sq, part_ptr, counters_ptr + tile, split, BLOCK_M, BLOCK_N, NUM_SPLITS, HAS_RMS
        )
        if is_last:
            store_tile(
                acc, sum_sq, m, tile_n,
                column_scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr,
                stride_rm, stride_om, M, N, K, rms_eps, BLOCK_M, BLOCK_N, HAS_RMS, SWIGLU,
            )  # fmt: skip
    else:
        store_tile(
            acc, sum_sq, m, tile_n,
            column_scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr,
            stride_rm, stride_om, M, N, K, rms_eps, BLOCK_M, BLOCK_N, HAS_RMS, SWIGLU,
        )  # fmt: skip


def part_num_floats(block_m: int, block_n: int) -> int:
    """Float32 values one program of a split tile leaves in the workspace."""
    return block_m * block_n + block_m
