"""A quantised weight widened into memory, for products that are bound by arithmetic.

    out[n, k] = q[n, k] scale[n, k // group_size]        one scale per row where group_size is None

Shapes: weight and scale as in `weight_only_gemm`: int8 or float8_e4m3fn [N, K] with scale [N], or
int16 [N, packed_width] by `pack_int4` with scale [N, K / group_size]; out [N, K] bfloat16, float16
or float32, rows may be apart.

Bytes: N K (bits / 8 + itemsize of out) + scales; no arithmetic to speak of. Bound: memory; where
out fits in L2 and is read next, reading the weights.
Source: `weight_only_gemm`; one rounding, of the float32 product, to out's dtype.

Assumes contiguous rows; N K may pass 2^31. Does not know what the weight is multiplied with.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.int4_packing import packed_width, plane_size, unpack_int4
from kernels.platform import runs_triton

BLOCK_N = 8
BLOCK_K = 1024
CHUNKS = 4
"""Of int4 planes, side by side in a program."""
NUM_WARPS = 8


def dequantize_weight_reference(
    weight: Tensor, scale: Tensor, *, group_size: int | None, out: Tensor
) -> Tensor:
    """The same in float32 torch, rounded once at the end."""
    if group_size is None:
        return out.copy_(weight.float() * scale.float()[:, None])
    k = out.shape[1]
    scales = scale.float().repeat_interleave(group_size, dim=1)[:, :k]
    return out.copy_(unpack_int4(weight, k, group_size=group_size).float() * scales)


@triton.jit
def _dequantize_kernel(
    weight_ptr,  # [N, K] int8 or e4m3
    scale_ptr,  # [N]
    out_ptr,  # [N, K]
    stride_wn: tl.int64,
    stride_on: tl.int64,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_range = (n < N)[:, None] & (k < K)[None, :]
    weight_ptrs = weight_ptr + n[:, None] * stride_wn + k[None, :]
    weight = tl.load(weight_ptrs, mask=in_range, other=0.0, eviction_policy="evict_first")
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)  # [BLOCK_N]
    out = weight.to(tl.float32) * scale[:, None]  # [BLOCK_N, BLOCK_K]
    out_ptrs = out_ptr + n[:, None] * stride_on + k[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_range)


@triton.jit
def _dequantize_int4_kernel(
    words_ptr,  # [N, packed_width] int16
    scale_ptr,  # [N, K / GROUP_SIZE]
    out_ptr,  # [N, K]
    stride_wn: tl.int64,
    stride_sn: tl.int64,
    stride_sg: tl.int64,
    stride_on: tl.int64,
    N,
    K,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * (CHUNKS * PLANE) + tl.arange(0, CHUNKS * PLANE)  # words of a row
    # Where plane 0 of a word's chunk begins, and the word's place in every plane.
    k_0 = j // PLANE * (4 * PLANE) + j % PLANE
    words_ptrs = words_ptr + n[:, None] * stride_wn + j[None, :]
    in_range = (n < N)[:, None] & (k_0 < K)[None, :]
    words = tl.load(words_ptrs, mask=in_range, other=0, eviction_policy="evict_first")
    for plane in tl.static_range(4):
        k = k_0 + plane * PLANE
        in_range = (n < N)[:, None] & (k < K)[None, :]
        scale_ptrs = scale_ptr + n[:, None] * stride_sn + (k // GROUP_SIZE)[None, :] * stride_sg
        scale = tl.load(scale_ptrs, mask=in_range, other=0.0).to(tl.float32)
        q = ((words >> (4 * plane)) & 15) - 8
        out = q.to(tl.float32) * scale  # [BLOCK_N, CHUNKS * PLANE]
        out_ptrs = out_ptr + n[:, None] * stride_on + k[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_range)


def dequantize_weight(
    weight: Tensor, scale: Tensor, *, group_size: int | None = None, out: Tensor
) -> Tensor:
    """`out`, filled with the numbers times their scales.

    Raises: ValueError for shapes or strides the kernel does not serve.
    """
    n, k = out.shape
    width = k if group_size is None else packed_width(k, group_size)
    if tuple(weight.shape) != (n, width) or scale.shape[0] != n:
        raise ValueError(
            f"weight is {tuple(weight.shape)} with scale {tuple(scale.shape)}, "
            f"out {tuple(out.shape)} takes ({n}, {width})"
        )
    if weight.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError(
            f"rows must be contiguous: weight has strides {weight.stride()}, out {out.stride()}"
        )
    if out.numel() == 0:
        return out
    if not runs_triton(weight):
        return dequantize_weight_reference(weight, scale, group_size=group_size, out=out)
    strides = weight.stride(0), out.stride(0)
    if group_size is None:
        grid = triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K)
        _dequantize_kernel[grid](
            weight, scale, out, *strides, n, k, BLOCK_N, BLOCK_K, num_warps=NUM_WARPS
        )
        return out
    plane = plane_size(group_size)
    _dequantize_int4_kernel[(triton.cdiv(n, BLOCK_N), triton.cdiv(width, CHUNKS * plane))](
        weight,
        scale,
        out,
        weight.stride(0),
        *scale.stride(),
        out.stride(0),
        n,
        k,
        BLOCK_N,
        CHUNKS,
        plane,
        group_size,
        num_warps=NUM_WARPS,
    )
    return out
