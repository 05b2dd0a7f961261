"""y = epilogue(x W^T) for 1-8 rows of x and int8 or int4 weights, at the speed they can be read.

    y[m, n] = f(rstd[m] sum_k x[m, k] q[n, k] scale[n, k // group_size] + bias[n]) + residual[m, n]

Shapes: x [M, K] bfloat16, M 1-8; weights, scales and epilogue as in `weight_only_gemm`, int4 in
groups of 64 or 128.

Bytes: N K bits / 8 + scales + M (K + N) itemsize; FLOPs: 2 M N K. Bound: reading the weights once.
Products are exact and summed in float32. A multiprocessor issues 128 instructions of a thread a
clock, at the memory's rate 7.5 an int8 weight and 3.7 an int4 weight. The sm_90a code has 2.4 and
1.9 with 14,336 columns, 3.2 and 2.2 with 4,096 and all around the product.
Source: weight-only quantisation, https://arxiv.org/abs/2210.17323.

Assumes contiguous rows that start at multiples of 16 bytes. Does not run under the interpreter:
`weight_only_gemm` computes the same there, and everything this file does not serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gemm_epilogue import Epilogue
from kernels.platform import is_interpreted
from kernels.streamed_gemm_kernel import streamed_gemm_kernel

MAX_NUM_ROWS = 8
GROUP_SIZES = (None, 64, 128)
"""None: int8."""
BLOCK_BYTES = 128
"""Of a weight row: what one warp multiplies in one step."""
MAX_ROW_BYTES = 32 * 1024
"""Of a weight: steps are unrolled."""
MAX_OFFSET = 1 << 31
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class StreamedTile:
    """Shape of one program's work."""

    num_warps: int
    """They share K."""
    num_row_blocks: int
    """Weight rows of a tile, in blocks of 16."""
    num_stages: int
    """Steps whose weights are under way at any time."""
    max_registers: int | None = None
    """Of a thread: fewer let more programs share a multiprocessor."""


def streamed_tile_for(num_rows: int, n: int, k: int, *, group_size: int | None) -> StreamedTile:
    """The tile for M = `num_rows`, N = `n` rows of the weight and K = `k`: the fastest of the
    candidates in the layers of Llama-3.1-8B, one after the other as a decode step has them."""
    if group_size is None:
        return StreamedTile(8, 1, 2, 80) if k <= 8192 else StreamedTile(16, 1, 2, 64)
    if k > 8192:
        return StreamedTile(8, 1, 2, 128)
    if n <= 4096:
        return StreamedTile(8, 1, 2)
    if num_rows > 4:
        return StreamedTile(8, 2, 1, 128)
    return StreamedTile(4, 1, 2 if num_rows == 1 and n <= 8192 else 4, 128)


def candidate_streamed_tiles(
    num_rows: int, n: int, k: int, *, group_size: int | None
) -> list[StreamedTile]:
    """Tiles worth timing, the one in use first."""
    tiles = [streamed_tile_for(num_rows, n, k, group_size=group_size)]
    tiles += [
        StreamedTile(num_warps, num_row_blocks, num_stages, max_registers)
        for num_warps, max_registers in (
            (4, 96),
            (4, 128),
            (4, None),
            (8, 80),
            (8, 128),
            (8, None),
            (16, 64),
            (16, None),
        )
        for num_row_blocks in (1, 2)
        for num_stages in (1, 2, 3, 4)
        if num_row_blocks * num_stages <= 4
    ]
    return list(dict.fromkeys(tiles))


def can_stream(x: Tensor, weight: Tensor, scale: Tensor, group_size: int | None) -> bool:
    """Whether this kernel serves operands that `weight_only_gemm` has checked."""
    num_rows, k = x.shape
    return (
        not is_interpreted()
        and 1 <= num_rows <= MAX_NUM_ROWS
        and x.dtype == torch.bfloat16
        and weight.dtype in (torch.int8, torch.int16)
        and group_size in GROUP_SIZES
        and weight.shape[1] * weight.element_size() <= MAX_ROW_BYTES
        and weight.shape[0] * weight.stride(0) < MAX_OFFSET
        and num_rows * x.stride(0) + k < MAX_OFFSET
        and (scale.dim() == 1 or scale.shape[0] * scale.shape[1] < MAX_OFFSET)
        and _is_aligned(x)
        and _is_aligned(weight)
    )


def _is_aligned(x: Tensor) -> bool:
    """Rows start where a thread can load 16 bytes at once."""
    return x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0


def launch_streamed(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    tile: StreamedTile,
    *,
    group_size: int | None,
    launch_pdl: bool,
) -> None:
    """Launch the kernel for operands that `can_stream` accepts."""
    (num_rows, k), n = x.shape, out.shape[1]
    is_int4 = group_size is not None
    columns_of_step = tile.num_warps * BLOCK_BYTES * (2 if is_int4 else 1)
    num_steps = triton.cdiv(k, columns_of_step)
    out_rows = tile.num_row_blocks * (8 if epilogue.swiglu else 16)
    residual = epilogue.residual
    options: dict[str, Any] = {"num_warps": tile.num_warps, "launch_pdl": launch_pdl}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    streamed_gemm_kernel[(triton.cdiv(n, out_rows),)](
        x,
        weight,
        scale,
        epilogue.bias,
        residual,
        out,
        x.stride(0),
        weight.stride(0),
        scale.stride(0) if is_int4 else 0,
        0 if residual is None else residual.stride(0),
        out.stride(0),
        num_rows,
        n,
        k,
        weight.shape[1],
        scale.shape[1] if is_int4 else 0,
        0.0 if epilogue.rms_eps is None else epilogue.rms_eps,
        ROWS=triton.next_power_of_2(num_rows),
        WARPS=tile.num_warps,
        R=tile.num_row_blocks,
        STEPS=num_steps,
        STAGES=min(tile.num_stages, num_steps),
        GROUPS=0 if group_size is None else 256 // group_size,
        STRIDE_SG=scale.stride(1) if is_int4 else 0,
        RMS_WIDTH=0 if epilogue.rms_eps is None else max(triton.next_power_of_2(k), 8),
        SWIGLU=epilogue.swiglu,
        EVEN_K=k % columns_of_step == 0,
        EVEN_N=n % out_rows == 0,
        USE_PDL=launch_pdl,
        **options,
    )
