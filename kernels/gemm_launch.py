"""From checked tensors to a kernel launch: tiles, split-K workspace, and the checks all GEMM
launchers share.

Does not choose tiles: each operation has its own table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.gemm_epilogue import Epilogue, part_num_floats
from kernels.gemm_tile import _dot_kernel, _gemv_kernel, _rstd_kernel
from kernels.platform import is_interpreted

CACHE_LINE_BYTES = 128
FUSED_RMS_MAX_NUM_ROWS = 64
"""Rows up to which a program adds up x^2 while it multiplies. With more, programs are bound by
arithmetic, and every one that shares the rows would repeat it: a kernel of its own is cheaper."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of one program's work."""

    block_m: int
    """Rows of x; a power of two."""
    block_n: int
    """Rows of the weight, half of them gate and half up with SwiGLU; a power of two."""
    block_k: int
    num_warps: int = 4
    num_stages: int = 1
    num_splits: int = 1
    """Programs that share the K of one output tile."""
    uses_dot: bool = True
    """Tensor cores; otherwise float32 multiply-adds (block_m 1-4)."""


@dataclass(frozen=True, slots=True)
class GemmWorkspace:
    """Where split-K programs leave their parts. Reused by kernels that run one after the other."""

    parts: Tensor
    """float32, any content."""
    counters: Tensor
    """int32, zero before and after every launch."""

    @staticmethod
    def for_launches(
        launches: Iterable[tuple[int, int, Tile]], device: torch.device
    ) -> GemmWorkspace:
        """Enough for each of (rows of x, rows of the weight, tile), one at a time."""
        sizes = [workspace_size(*launch) for launch in launches]
        num_floats = max((size.num_floats for size in sizes), default=0)
        num_tiles = max((size.num_tiles for size in sizes), default=0)
        return GemmWorkspace.allocate(num_floats, num_tiles, device)

    @staticmethod
    def allocate(num_floats: int, num_tiles: int, device: torch.device) -> GemmWorkspace:
        return GemmWorkspace(
            parts=torch.empty(num_floats, dtype=torch.float32, device=device),
            counters=torch.zeros(num_tiles, dtype=torch.int32, device=device),
        )


class WorkspaceSize(NamedTuple):
    num_floats: int
    num_tiles: int


def workspace_size(num_rows: int, n: int, tile: Tile) -> WorkspaceSize:
    """What x [num_rows, K] times a weight of `n` rows needs; zeros where K is not split."""
    if tile.num_splits == 1:
        return WorkspaceSize(0, 0)
    num_tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(num_rows, tile.block_m)
    part = part_num_floats(tile.block_m, tile.block_n)
    return WorkspaceSize(num_tiles * tile.num_splits * part, num_tiles)


def launch_gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    tile: Tile,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    workspace: GemmWorkspace | None = None,
    fast_accumulation: bool = False,
    launch_pdl: bool = False,
) -> None:
    """Launch the kernel of `tile` for checked operands: x [M, K], weight [N or 2 N, K]."""
    (m, k), n = x.shape, out.shape[1]
    residual = epilogue.residual
    # Programs of a tile kernel that wait early take the room of the kernel before: it costs more
    # than an early start saves.
    uses_pdl = launch_pdl and not tile.uses_dot and not is_interpreted()
    fuses_rms = epilogue.rms_eps is not None and m <= FUSED_RMS_MAX_NUM_ROWS
    if epilogue.rms_eps is not None and not fuses_rms:
        row_scale = rstd_of_rows(x, epilogue.rms_eps, uses_pdl)
    operands = (x, weight, column_scale, row_scale, epilogue.bias, residual, out)
    numbers = (
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        m,
        n,
        k,
        0.0 if epilogue.rms_eps is None else epilogue.rms_eps,
    )
    options: dict[str, Any] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "HAS_RMS": fuses_rms,
        "SWIGLU": epilogue.swiglu,
        "EVEN_K": k % tile.block_k == 0,
        "USE_PDL": uses_pdl,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "launch_pdl": uses_pdl,
    }
    num_tiles_n = triton.cdiv(weight.shape[0], tile.block_n)
    if not tile.uses_dot:
        vector = min(16 // weight.element_size(), 16 // x.element_size())
        _gemv_kernel[(num_tiles_n,)](*operands, *numbers, VECTOR=vector, **options)
        return
    num_tiles = num_tiles_n * triton.cdiv(m, tile.block_m)
    parts, counters = split_buffers(workspace, m, weight.shape[0], tile, x.device)
    line = CACHE_LINE_BYTES // weight.element_size()
    _dot_kernel[(num_tiles, tile.num_splits)](
        *operands,
        parts,
        counters,
        *numbers,
        NUM_SPLITS=tile.num_splits,
        FAST_ACCUMULATION=fast_accumulation,
        PREFETCH_LINES=triton.next_power_of_2(max(tile.num_stages * tile.block_k // line, 1)),
        LINE=line,
        INTERPRETED=is_interpreted(),
        **options,
    )


def rstd_of_rows(x: Tensor, rms_eps: float, uses_pdl: bool) -> Tensor:
    """float32 [M]: rsqrt(mean(x^2) + rms_eps) of rows [M, K]."""
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _rstd_kernel[(x.shape[0],)](
        x,
        rstd,
        x.stride(0),
        x.shape[1],
        rms_eps,
        BLOCK_K=min(triton.next_power_of_2(x.shape[1]), 4096),
        USE_PDL=uses_pdl,
        num_warps=4,
        launch_pdl=uses_pdl,
    )
    return rstd


def split_buffers(
    workspace: GemmWorkspace | None, num_rows: int, n: int, tile: Tile, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Parts and counters for one launch; nothing where K is not split.

    Raises: ValueError when the workspace is smaller than the launch needs.
    """
    if tile.num_splits == 1:
        return None, None
    size = workspace_size(num_rows, n, tile)
    if workspace is None:
        workspace = GemmWorkspace.allocate(*size, device)
    if (
        workspace.parts.numel() < size.num_floats
        or workspace.counters.numel() < size.num_tiles
        or workspace.parts.device != device
    ):
        raise ValueError(
            f"the workspace on {workspace.parts.device} holds {workspace.parts.numel()} floats and "
            f"{workspace.counters.numel()} counters, this launch on {device} needs "
            f"{size.num_floats} and {size.num_tiles}; make it by GemmWorkspace.for_launches"
        )
    return workspace.parts, workspace.counters


def check_operand(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises: ValueError unless `x` has this shape, device, and contiguous rows."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, it must be {shape}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, x is on {device}; move it there")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {x.stride(-1)} in its last dimension, it must be 1; "
            "call .contiguous()"
        )


def check_input(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises: ValueError unless x is [M, K] of one of `dtypes` with contiguous rows."""
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, it must be [M, K] with K >= 1")
    check_dtype("x", x, dtypes)
    check_operand("x", x, tuple(x.shape), x.device)


def check_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises: ValueError unless `x` has one of `dtypes`."""
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {x.dtype}, it must be one of {allowed}")


def prepare_out(
    x: Tensor, num_weight_rows: int, epilogue: Epilogue, out: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`out` or a new [M, N], after checking it and the epilogue's operands against the weight.

    Raises: ValueError with the value, the limit and the fix.
    """
    if epilogue.swiglu and num_weight_rows % 2:
        raise ValueError(f"swiglu needs as many gate as up rows, the weight has {num_weight_rows}")
    shape = (x.shape[0], num_weight_rows // 2 if epilogue.swiglu else num_weight_rows)
    if epilogue.bias is not None:
        check_operand("bias", epilogue.bias, (num_weight_rows,), x.device)
    if epilogue.residual is not None:
        check_operand("residual", epilogue.residual, shape, x.device)
    if out is None:
        return x.new_empty(shape, dtype=dtype)
    check_operand("out", out, shape, x.device)
    check_dtype("out", out, (dtype,))
    return out


NUM_PROGRAMS_TO_FILL = 120
"""About one program on each of the 132 multiprocessors of an H100 or H200; with four stages of
asynchronous copies each, that many keep the memory busy, and every further part costs traffic."""


def num_splits_to_fill(
    num_tiles: int, k: int, block_k: int, *, num_programs: int = NUM_PROGRAMS_TO_FILL
) -> int:
    """The fewest parts of K that give every multiprocessor a program; at most 8."""
    num_steps = triton.cdiv(k, block_k)
    return max(1, min(triton.cdiv(num_programs, num_tiles), num_steps // 4, 8))
