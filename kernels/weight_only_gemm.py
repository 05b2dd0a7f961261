"""y = x W^T with weights of 8 or 4 bits, widened on their way to the multiplication.

    y[m, n] = f(rstd[m] sum_k x[m, k] q[n, k] scale[n, k // group_size] + bias[n])
              + residual[m, n]

| weight                                  | scale                                         |
| int8 [N, K]                             | [N], one per output channel                   |
| float8_e4m3fn [N, K]                    | [N], one per output channel                   |
| int16 [N, K / 4], by `pack_int4`        | [N, K / group_size], group_size 32, 64 or 128 |

Shapes: x [M, K] bfloat16, float16 or float32, any M; bias [N]; residual and y [M, N]; scale
float32, bfloat16 or float16. f, rstd and residual as in `skinny_gemm`. int4 scales are read
fastest when scale.t() is contiguous.

Up to 8 rows of bfloat16 with int8 or int4 weights go to `streamed_gemm`; here are the others. From
some 500 rows on, widening the weight once (`dequantize_weight`) and multiplying by cuBLAS is
faster.

Bytes: N K bits / 8 + scales + M (K + N) itemsize; FLOPs: 2 M N K. Bound: reading the weights once
up to about 64 rows, the tensor cores in x's dtype from a few hundred on. A multiprocessor issues
128 instructions of a thread a clock; at the memory's rate int8 leaves it 7.5 a weight and int4
3.7. The sm_90a code of the loop has 3.5 for int8, 4.0 for e4m3 and 2.2 for int4 (8 rows, with the
sum of squares).
Source: weight-only quantisation per channel and per group, https://arxiv.org/abs/2210.17323.

Assumes contiguous rows; N K and M K may pass 2^31. Does not quantise: it takes what was.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.dequantize_weight import dequantize_weight_reference
from kernels.gemm_epilogue import Epilogue, finish_reference
from kernels.gemm_launch import (
    FUSED_RMS_MAX_NUM_ROWS,
    NUM_PROGRAMS_TO_FILL,
    GemmWorkspace,
    Tile,
    check_dtype,
    check_input,
    check_operand,
    launch_gemm,
    num_splits_to_fill,
    prepare_out,
    rstd_of_rows,
    split_buffers,
)
from kernels.int4_packing import NUM_PLANES, pack_int4, packed_width, plane_size, unpack_int4
from kernels.int4_tile import _int4_kernel
from kernels.platform import is_interpreted, runs_triton
from kernels.streamed_gemm import MAX_NUM_ROWS as STREAMED_MAX_NUM_ROWS
from kernels.streamed_gemm import (
    StreamedTile,
    can_stream,
    candidate_streamed_tiles,
    launch_streamed,
    streamed_tile_for,
)

__all__ = ["candidate_tiles", "pack_int4", "tile_for", "unpack_int4", "weight_only_gemm"]

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.int16)
DECODE_MAX_NUM_ROWS = 64


def dequantize(weight: Tensor, scale: Tensor, k: int, group_size: int | None) -> Tensor:
    """float32 [N, K] of quantised weights."""
    out = torch.empty(weight.shape[0], k, dtype=torch.float32, device=weight.device)
    return dequantize_weight_reference(weight, scale, group_size=group_size, out=out)


def weight_only_gemm_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    group_size: int | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rms_eps: float | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The same in float32 torch, rounded once at the end."""
    epilogue = Epilogue(bias, residual, rms_eps, swiglu)
    out = prepare_out(x, weight.shape[0], epilogue, out, x.dtype)
    weight_32 = dequantize(weight, scale, x.shape[1], group_size)
    return finish_reference(x.float() @ weight_32.T, x, epilogue, out)


def tile_for(num_rows: int, n: int, k: int, *, group_size: int | None, itemsize: int = 2) -> Tile:
    """The tile for M = `num_rows`, N = `n` rows of the weight, K = `k` and x of `itemsize` bytes.

    For int4 block_k is the chunk that one step reads, or half of it.
    """
    if itemsize == 4:
        # float32 is multiplied outside the tensor cores, in registers: small tiles.
        block_k = 32 if group_size is None else NUM_PLANES * plane_size(group_size)
        return Tile(16, 32, block_k, num_warps=4, num_stages=2)
    if num_rows > DECODE_MAX_NUM_ROWS:
        return _tile_for_many_rows(num_rows, n, k, group_size)
    if num_rows == 1 and group_size is None and k <= 8192:
        return Tile(1, 4, 1024, num_warps=4, uses_dot=False)
    block_m = max(8, triton.next_power_of_2(num_rows))
    if group_size is None:
        block_n, num_warps = 64, 4
        block_k = 256 if block_m == 8 else 128
    else:
        wide = block_m == 64 or (block_m == 8 and n > 8192)
        block_n, num_warps = (128, 8 if block_m == 64 else 4) if wide else (64, 4)
        block_k = NUM_PLANES * plane_size(group_size)
    # Widening is work: with few rows, int4 takes two programs a multiprocessor and more.
    num_programs = 260 if block_m == 8 and group_size is not None else NUM_PROGRAMS_TO_FILL
    num_splits = num_splits_to_fill(triton.cdiv(n, block_n), k, block_k, num_programs=num_programs)
    return Tile(block_m, block_n, block_k, num_warps, 4, num_splits)


def _tile_for_many_rows(num_rows: int, n: int, k: int, group_size: int | None) -> Tile:
    """Tiles of 128 rows; K is split until every multiprocessor has a program or two."""
    if group_size is None:
        block_n, block_k, num_warps, num_programs = 64, 64, 4, 200
    else:
        block_n, block_k, num_warps, num_programs = 128, 128, 8, NUM_PROGRAMS_TO_FILL
    num_tiles = triton.cdiv(n, block_n) * triton.cdiv(num_rows, 128)
    num_splits = num_splits_to_fill(num_tiles, k, block_k, num_programs=num_programs)
    # Two programs of 8 warps fit a multiprocessor with three stages, where there are as many.
    num_stages = 4 if group_size is None or num_tiles * num_splits <= 132 else 3
    return Tile(128, block_n, block_k, num_warps, num_stages, num_splits)


def candidate_tiles(
    num_rows: int, n: int, k: int, *, group_size: int | None, streams: bool = False
) -> list[Tile | StreamedTile]:
    """Tiles worth timing for a shape, the table's own first; `streams` where `can_stream` holds."""
    tiles: list[Tile | StreamedTile] = []
    if streams and num_rows <= STREAMED_MAX_NUM_ROWS:
        tiles += candidate_streamed_tiles(num_rows, n, k, group_size=group_size)
    tiles.append(tile_for(num_rows, n, k, group_size=group_size))
    if group_size is None and num_rows <= 4:
        tiles += [
            Tile(triton.next_power_of_2(num_rows), block_n, block_k, num_warps, uses_dot=False)
            for block_n in (2, 4, 8, 16)
            for block_k in (1024, 2048, 4096)
            for num_warps in (2, 4, 8)
            if 32 <= block_n * block_k // (32 * num_warps) <= 128
        ]
    block_ks: tuple[int, ...] = (64, 128, 256)
    if group_size is not None:
        block_ks = (128,) if group_size == 32 else (128, 256)
    if num_rows > DECODE_MAX_NUM_ROWS:
        shapes = [(128, 64, 4), (128, 128, 8), (256, 64, 8), (256, 128, 8), (64, 128, 4)]
        splits: tuple[int, ...] = (1, 2, 4) if num_rows <= 256 else (1,)
    else:
        block_m = max(8, triton.next_power_of_2(num_rows))
        shapes = [(block_m, 64, 4), (block_m, 128, 4), (block_m, 128, 8), (block_m, 256, 8)]
        splits = (1, 2, 3, 4, 6, 8)
    tiles += [
        Tile(block_m, block_n, block_k, num_warps, num_stages, num_splits)
        for block_m, block_n, num_warps in shapes
        for block_k in block_ks
        for num_stages in (3, 4, 6)
        for num_splits in splits
        if (block_n + 2 * block_m) * block_k * num_stages <= 200 * 1024
        and num_splits * block_k <= k
    ]
    return list(dict.fromkeys(tiles))


def weight_only_gemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    group_size: int | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rms_eps: float | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
    workspace: GemmWorkspace | None = None,
    tile: Tile | StreamedTile | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """y [M, N], or [M, N/2] with swiglu, in x's dtype.

    group_size belongs to packed int4 weights and None to the others. `out` may be `residual`
    itself. `workspace` serves every launch of a stream in turn; without one, shapes that split K
    allocate theirs. `tile` overrides the table, for tuning.

    Raises: ValueError for shapes, dtypes, devices or strides the kernel does not serve.
    """
    check_input(x, INPUT_DTYPES)
    _check_weight(x, weight, scale, group_size)
    epilogue = Epilogue(bias, residual, rms_eps, swiglu)
    out = prepare_out(x, weight.shape[0], epilogue, out, x.dtype)
    if out.numel() == 0:
        return out
    if not runs_triton(x):
        return weight_only_gemm_reference(
            x,
            weight,
            scale,
            group_size=group_size,
            bias=bias,
            residual=residual,
            rms_eps=rms_eps,
            swiglu=swiglu,
            out=out,
        )
    if tile is None:
        shape = (x.shape[0], weight.shape[0], x.shape[1])
        if can_stream(x, weight, scale, group_size):
            tile = streamed_tile_for(*shape, group_size=group_size)
        else:
            tile = tile_for(*shape, group_size=group_size, itemsize=x.element_size())
    if isinstance(tile, StreamedTile):
        launch_streamed(
            x, weight, scale, out, epilogue, tile, group_size=group_size, launch_pdl=launch_pdl
        )
    elif group_size is None:
        launch_gemm(
            x,
            weight,
            out,
            epilogue,
            tile,
            column_scale=scale,
            workspace=workspace,
            launch_pdl=launch_pdl,
        )
    else:
        _launch_int4(x, weight, scale, out, epilogue, tile, group_size, workspace, launch_pdl)
    return out


def _check_weight(x: Tensor, weight: Tensor, scale: Tensor, group_size: int | None) -> None:
    check_dtype("weight", weight, WEIGHT_DTYPES)
    check_dtype("scale", scale, SCALE_DTYPES)
    num_rows, k = weight.shape[0], x.shape[1]
    if (weight.dtype == torch.int16) != (group_size is not None):
        raise ValueError(
            f"group_size is {group_size} and the weight {weight.dtype}; packed int4 weights "
            "(int16) have a group_size, others have none"
        )
    if group_size is None:
        check_operand("weight", weight, (num_rows, k), x.device)
        check_operand("scale", scale, (num_rows,), x.device)
        return
    check_operand("weight", weight, (num_rows, packed_width(k, group_size)), x.device)
    shape = (num_rows, -(-k // group_size))
    if tuple(scale.shape) != shape or scale.device != x.device:
        raise ValueError(
            f"scale is {tuple(scale.shape)} on {scale.device}, it must be {shape} on {x.device}"
        )


def _launch_int4(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    tile: Tile,
    group_size: int,
    workspace: GemmWorkspace | None,
    launch_pdl: bool,
) -> None:
    (num_rows, k), n = x.shape, out.shape[1]
    num_tiles = triton.cdiv(weight.shape[0], tile.block_n) * triton.cdiv(num_rows, tile.block_m)
    parts, counters = split_buffers(workspace, num_rows, weight.shape[0], tile, x.device)
    plane = plane_size(group_size)
    residual = epilogue.residual
    uses_pdl = launch_pdl and not is_interpreted()
    fuses_rms, row_scale = epilogue.rms_eps is not None, None
    if epilogue.rms_eps is not None and num_rows > FUSED_RMS_MAX_NUM_ROWS:
        fuses_rms, row_scale = False, rstd_of_rows(x, epilogue.rms_eps, uses_pdl)
    options: dict[str, Any] = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "launch_pdl": uses_pdl,
    }
    _int4_kernel[(num_tiles, tile.num_splits)](
        x,
        weight,
        scale,
        row_scale,
        epilogue.bias,
        residual,
        out,
        parts,
        counters,
        x.stride(0),
        weight.stride(0),
        scale.stride(0),
        scale.stride(1),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        num_rows,
        n,
        k,
        scale.shape[1],
        0.0 if epilogue.rms_eps is None else epilogue.rms_eps,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        PLANE=plane,
        STEP=tile.block_k // NUM_PLANES,
        GROUPS=NUM_PLANES * plane // group_size,
        NUM_SPLITS=tile.num_splits,
        SCALE_WEIGHTS=tile.block_m >= 128,
        HAS_RMS=fuses_rms,
        SWIGLU=epilogue.swiglu,
        EVEN_K=k % (NUM_PLANES * plane) == 0,
        PREFETCH_LINES=triton.next_power_of_2(
            max(tile.num_stages * tile.block_k // (64 * NUM_PLANES), 1)
        ),
        PREFETCH_GROUPS=triton.next_power_of_2(triton.cdiv(scale.shape[1], tile.num_splits)),
        USE_PDL=uses_pdl,
        INTERPRETED=is_interpreted(),
        **options,
    )
