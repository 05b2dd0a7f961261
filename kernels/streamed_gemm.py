"""y = epilogue(x W^T) for 1-4 rows of x and int8 or int4 weights, at the speed they can be read.

    y[m, n] = f(rstd[m] sum_k x[m, k] q[n, k] scale[n, k // group_size] + bias[n]) + residual[m, n]

Shapes: x [M, K] bfloat16, M 1-4; weights, scales and epilogue as in `weight_only_gemm`, int4 in
groups of 64 or 128.

Bytes: N K bits / 8 + scales + M (K + N) itemsize; FLOPs: 2 M N K. Bound: reading the weights once.
Arithmetic: x is split into three signed bytes, exact to 2^-21 of the largest value of 128 (int4:
256) neighbours, with 3 and 4 rows into two, exact to 2^-14; products with weights are summed as
integers, sums of such a block scaled and added in float32. A multiprocessor issues 128
instructions of a thread a clock, at the memory's rate 7.5 an int8 weight and 3.7 an int4 weight;
the sm_90a code of the loop has 1.3 and 1.7, as nothing is widened.
Source: integer products of fixed-point parts, https://arxiv.org/abs/2306.11975; weight-only
quantisation, https://arxiv.org/abs/2210.17323.

Assumes contiguous rows that start at multiples of 16 bytes. Does not run under the interpreter:
`weight_only_gemm` computes the same there, and everything this file does not serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.attention_arguments import num_multiprocessors
from kernels.gemm_epilogue import Epilogue
from kernels.int4_packing import plane_size
from kernels.platform import is_interpreted
from kernels.streamed_gemm_kernel import streamed_gemm_kernel

MAX_NUM_ROWS = 4
GROUP_SIZES = (None, 64, 128)
"""None: int8."""
BLOCK_BYTES = 128
"""Of a weight row: what one warp multiplies in one step."""
MAX_SHARED_BYTES = 200 * 1024
MAX_OFFSET = 1 << 31
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class StreamedTile:
    """Shape of one program's work. The defaults are, of all candidates, the fastest or within the
    noise of it for each format at 1 and 4 rows of the layers of Llama-3.1-8B."""

    num_warps: int = 8
    """They share K; 8 or 16."""
    num_row_blocks: int = 1
    """Weight rows of a tile, in blocks of 16."""
    num_stages: int = 4
    """Steps whose weights are under way at any time."""
    programs_per_sm: int = 1
    max_registers: int | None = None
    """Of a thread; 128 let two programs of 8 warps share a multiprocessor."""


def candidate_streamed_tiles(num_rows: int, *, group_size: int | None) -> list[StreamedTile]:
    """Tiles worth timing, the one in use first."""
    tiles = [StreamedTile()]
    tiles += [
        StreamedTile(num_warps, num_row_blocks, num_stages, programs_per_sm, max_registers)
        for num_warps, max_registers in ((8, 128), (8, None), (16, None), (8, 80))
        for num_row_blocks in (1, 2)
        for num_stages in (1, 2, 3, 4)
        for programs_per_sm in (1, 2, 3)
        if num_row_blocks * num_stages <= 4
        and num_warps * programs_per_sm <= 24
        and (max_registers or 128) * num_warps * 32 * programs_per_sm <= 65536
    ]
    return list(dict.fromkeys(tiles))


def can_stream(x: Tensor, weight: Tensor, scale: Tensor, group_size: int | None) -> bool:
    """Whether this kernel serves operands that `weight_only_gemm` has checked."""
    num_rows, k = x.shape
    bytes_of_row = k if group_size is None else weight.shape[1] * 2
    padded_bytes = triton.cdiv(bytes_of_row, 8 * BLOCK_BYTES) * 8 * BLOCK_BYTES
    return (
        not is_interpreted()
        and 1 <= num_rows <= MAX_NUM_ROWS
        and x.dtype == torch.bfloat16
        and weight.dtype in (torch.int8, torch.int16)
        and group_size in GROUP_SIZES
        and padded_bytes * 8 * (1 if group_size is None else 2) <= MAX_SHARED_BYTES
        and weight.shape[0] * weight.stride(0) * weight.element_size() // 4 < MAX_OFFSET
        and (scale.dim() == 1 or scale.shape[0] * scale.shape[1] < MAX_OFFSET)
        and bytes_of_row % 4 == 0
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
) -> None:
    """Launch the kernel for operands that `can_stream` accepts.

    Never as a dependent launch: its programs fill the multiprocessors, and those that wait there
    for the kernel before take the room it runs in. Measured in a decode step of Llama-3.1-8B at one
    row on an H200: 3.20 ms instead of 3.68 with int8 weights, 2.56 instead of 2.91 with int4.
    """
    (num_rows, k), n = x.shape, out.shape[1]
    words = weight.view(torch.int32)
    is_int4 = group_size is not None
    columns_of_step = tile.num_warps * BLOCK_BYTES * (2 if is_int4 else 1)
    out_rows = tile.num_row_blocks * (8 if epilogue.swiglu else 16)
    num_tiles = triton.cdiv(n, out_rows)
    num_programs = min(num_tiles, num_multiprocessors(x.device) * tile.programs_per_sm)
    residual = epilogue.residual
    options: dict[str, Any] = {"num_warps": tile.num_warps}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    streamed_gemm_kernel[(num_programs,)](
        x,
        words,
        scale,
        epilogue.bias,
        residual,
        out,
        x.stride(0),
        words.stride(0),
        scale.stride(0) if is_int4 else 0,
        scale.stride(1) if is_int4 else 0,
        0 if residual is None else residual.stride(0),
        out.stride(0),
        num_rows,
        n,
        k,
        num_tiles,
        words.shape[1],
        scale.shape[1] if is_int4 else 0,
        0.0 if epilogue.rms_eps is None else epilogue.rms_eps,
        ROWS=triton.next_power_of_2(num_rows),
        COLUMNS=8,
        SLOTS=4 if num_rows <= 2 else 2,
        WARPS=tile.num_warps,
        R=tile.num_row_blocks,
        STEPS=triton.cdiv(k, columns_of_step),
        STAGES=tile.num_stages,
        PLANE=0 if group_size is None else plane_size(group_size),
        GROUPS=0 if group_size is None else 256 // group_size,
        HAS_RMS=epilogue.rms_eps is not None,
        SWIGLU=epilogue.swiglu,
        EVEN_K=k % columns_of_step == 0,
        EVEN_N=n % out_rows == 0,
        **options,
    )
