"""The gated activation of Llama's MLP.

    out = silu(s * gate) * (s * up),   silu(a) = a / (1 + exp(-a)),   s = row_scale or 1

gate_up [num_rows, 2 * width]: gate, then up; rows may be strided, elements of a row are adjacent.
out [num_rows, width]. bfloat16, float16 or float32. row_scale [num_rows] float32 is a factor that
the projection before left out (the 1/rms of its input's row).

Bytes: num_rows * width * itemsize * 3. Bound: copy bandwidth.
Limits: width * num_rows and strides may pass 2^31 elements.
Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.platform import is_interpreted, runs_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu_reference(
    gate_up: Tensor, *, row_scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The same in plain torch, float32 inside."""
    scaled = gate_up.float() if row_scale is None else gate_up.float() * row_scale[:, None]
    gate, up = scaled.chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    return product.to(gate_up.dtype) if out is None else out.copy_(product)


class Tile(NamedTuple):
    columns: int
    num_warps: int


def _tile(num_rows: int, width: int) -> Tile:
    """16 bytes of 16-bit gate and up a thread; few rows are cut finer to reach more SMs."""
    columns = 1024 if num_rows * width >= 132 * 4 * 1024 else 256
    columns = min(columns, triton.next_power_of_2(width))
    return Tile(columns, num_warps=max(columns // 256, 1))


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,  # [num_rows, 2 * WIDTH]
    row_scale_ptr,  # [num_rows] or None
    out_ptr,  # [num_rows, WIDTH]
    gate_up_stride: tl.int64,
    out_stride: tl.int64,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # One program a (row, tile of columns); tiles of a row are neighbours.
    tiles_per_row: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    tile = tl.program_id(0) % tiles_per_row
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    is_inside = columns < WIDTH
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate_ptrs = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + row)
        gate *= scale
        up *= scale
    product = gate * tl.sigmoid(gate) * up
    out_ptrs = out_ptr + row * out_stride + columns
    tl.store(out_ptrs, product.to(out_ptr.dtype.element_ty), mask=is_inside)


def swiglu(
    gate_up: Tensor,
    *,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """gate_up [num_rows, 2 * width] -> [num_rows, width], into `out` when given.

    Raises ValueError on what the kernel does not take.
    """
    _check(gate_up, row_scale, out)
    if not runs_triton(gate_up):
        return swiglu_reference(gate_up, row_scale=row_scale, out=out)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows and width:
        tile = _tile(num_rows, width)
        use_pdl = launch_pdl and not is_interpreted()
        _swiglu_kernel[(num_rows * triton.cdiv(width, tile.columns),)](
            gate_up,
            row_scale,
            out,
            gate_up.stride(0),
            out.stride(0),
            WIDTH=width,
            COLUMNS=tile.columns,
            USE_PDL=use_pdl,
            num_warps=tile.num_warps,
            launch_pdl=use_pdl,
        )
    return out


def _check(gate_up: Tensor, row_scale: Tensor | None, out: Tensor | None) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {list(gate_up.shape)}; give [num_rows, 2 * width]")
    if gate_up.dtype not in DTYPES:
        raise ValueError(f"gate_up is {gate_up.dtype}; give one of {', '.join(map(str, DTYPES))}")
    if gate_up.stride(1) != 1:
        raise ValueError(f"gate_up has column stride {gate_up.stride(1)}; make rows contiguous")
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is not None:
        if out.shape != (num_rows, width) or out.dtype != gate_up.dtype:
            raise ValueError(
                f"out is {list(out.shape)} {out.dtype}; give [{num_rows}, {width}] {gate_up.dtype}"
            )
        if out.device != gate_up.device or (out.stride(1) != 1 and width > 1):
            raise ValueError(
                f"out is on {out.device} with column stride {out.stride(1)}; "
                f"give contiguous rows on {gate_up.device}"
            )
    if row_scale is not None and (
        row_scale.shape != (num_rows,)
        or row_scale.dtype != torch.float32
        or not row_scale.is_contiguous()
        or row_scale.device != gate_up.device
    ):
        raise ValueError(
            f"row_scale is {list(row_scale.shape)} {row_scale.dtype} on {row_scale.device}; "
            f"give a contiguous [{num_rows}] float32 on {gate_up.device}"
        )
