"""Root-mean-square normalisation, with the residual addition that precedes it fused in.

    residual <- residual + x                                  (when given, in place)
    out = residual / sqrt(mean(residual^2) + eps) * weight    (x in its place when there is none)

x, residual, out [num_rows, width] in bfloat16, float16 or float32; rows may be strided, elements
of a row are adjacent. weight [width] or None where the gain is folded into the next projection.

Bytes: num_rows * width * itemsize * 2, or * 4 with a residual, and width * itemsize of weight.
Bound: copy bandwidth; below some hundred rows, the latency of one pass over a row.
Limits: width 1..16384; num_rows * row stride may pass 2^31 elements.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.platform import is_interpreted, runs_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 16384


def rms_norm_reference(
    x: Tensor,
    *,
    eps: float,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, float32 inside; returns `out` and updates `residual`."""
    if residual is not None:
        residual.copy_(residual.float() + x.float())
    rows = (x if residual is None else residual).float()
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        rows = rows * weight.float()
    return rows.to(x.dtype) if out is None else out.copy_(rows)


class Tile(NamedTuple):
    rows: int
    """Rows of one program."""
    columns: int
    """A power of two that holds a row."""
    num_warps: int


def _tile(num_rows: int, width: int) -> Tile:
    """Wide rows have a program each; narrow ones share one as long as every SM has some."""
    columns = triton.next_power_of_2(width)
    rows = 1
    while rows * columns < 2048 and rows * 132 * 8 <= num_rows:
        rows *= 2
    return Tile(rows, columns, num_warps=min(max(rows * columns // 512, 1), 16))


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,  # [num_rows, WIDTH]
    residual_ptr,  # [num_rows, WIDTH] or None
    weight_ptr,  # [WIDTH] or None
    out_ptr,  # [num_rows, WIDTH]
    x_stride: tl.int64,
    residual_stride: tl.int64,
    out_stride: tl.int64,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    columns = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    is_inside = (rows < num_rows) & (columns < WIDTH)
    if USE_PDL:
        gdc_launch_dependents()
    if weight_ptr is not None:
        # A weight is no other kernel's output, so it is fetched while that kernel finishes.
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if USE_PDL:
        gdc_wait()
    x = tl.load(x_ptr + rows * x_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows * residual_stride + columns
        x += tl.load(residual_ptrs, mask=is_inside, other=0.0).to(tl.float32)
        # The norm is of the sum that later layers see, which is the rounded one.
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, rounded, mask=is_inside)
        x = rounded.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / WIDTH  # [ROWS]
    y = x * tl.rsqrt(mean_square + eps)[:, None]
    if weight_ptr is not None:
        y = y * weight
    out_ptrs = out_ptr + rows * out_stride + columns
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=is_inside)


@overload
def rms_norm(
    x: Tensor,
    *,
    eps: float,
    weight: Tensor | None = None,
    residual: None = None,
    out: Tensor | None = None,
    launch_pdl: bool = False,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    *,
    eps: float,
    weight: Tensor | None = None,
    residual: Tensor,
    out: Tensor | None = None,
    launch_pdl: bool = False,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    *,
    eps: float,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    launch_pdl: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of x [num_rows, width]; returns out, or (out, residual) with a residual.

    `residual` is of x's shape and dtype and becomes residual + x, rounded. `out` may be x itself.
    Raises ValueError on what the kernel does not take.
    """
    _check(x, weight, residual, out)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, width = x.shape
    if not runs_triton(x):
        rms_norm_reference(x, eps=eps, weight=weight, residual=residual, out=out)
    elif num_rows:
        tile = _tile(num_rows, width)
        use_pdl = launch_pdl and not is_interpreted()
        _rms_norm_kernel[(triton.cdiv(num_rows, tile.rows),)](
            x,
            residual,
            weight,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            num_rows,
            eps,
            WIDTH=width,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            USE_PDL=use_pdl,
            num_warps=tile.num_warps,
            launch_pdl=use_pdl,
        )
    return out if residual is None else (out, residual)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None, out: Tensor | None) -> None:
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x is {list(x.shape)}; give [num_rows, width], width 1..{MAX_WIDTH}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; give one of {', '.join(map(str, DTYPES))}")
    for name, rows in (("x", x), ("residual", residual), ("out", out)):
        if rows is None:
            continue
        if rows.shape != x.shape or rows.dtype != x.dtype or rows.device != x.device:
            raise ValueError(
                f"{name} is {list(rows.shape)} {rows.dtype} on {rows.device}; "
                f"give {list(x.shape)} {x.dtype} on {x.device} like x"
            )
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            raise ValueError(f"{name} has column stride {rows.stride(1)}; make its rows contiguous")
    if weight is not None and (weight.shape != x.shape[1:] or not weight.is_contiguous()):
        raise ValueError(f"weight is {list(weight.shape)}; give a contiguous [{x.shape[1]}]")
    if weight is not None and weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}; move it there")
