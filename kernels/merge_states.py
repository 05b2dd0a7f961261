"""Merge of attention over disjoint parts of a context into attention over all of it.

    out = sum_s w_s outs_s,  w_s = exp(lse_s - lse),  lse = log sum_s exp(lse_s)

outs [num_parts, ..., head_dim] float32, each normalised by its own softmax denominator, whose
natural logarithm is lse [num_parts, ...] float32; a part that saw nothing has lse -inf, and its
outs are not used. Result [..., head_dim] and [...].

Bytes: 4 * num_parts * rows * (head_dim + 1) read, rows * (head_dim * out.element_size() + 4)
written; bound by memory. Parts may be strided as long as each is contiguous.
Source: Ye et al., "Cascade inference" (the attention state and its merge); Dao et al.,
"Flash-Decoding for long-context inference".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.platform import is_interpreted, runs_triton

MAX_HEAD_DIM = 1024
BLOCK_ROWS = 4


class MergedState(NamedTuple):
    out: Tensor
    """[..., head_dim]; zeros where every part saw nothing."""
    lse: Tensor
    """[...] float32."""


def merge_states_reference(outs: Tensor, lse: Tensor, *, out: Tensor | None = None) -> MergedState:
    """The formula above in plain torch."""
    total = torch.logsumexp(lse, 0)
    seen = torch.isfinite(lse)
    weights = torch.where(seen, torch.exp(lse - total), 0.0)
    merged = torch.where(seen[..., None], outs, 0.0).mul(weights[..., None]).sum(0)
    if out is None:
        out = torch.empty_like(merged)
    return MergedState(out.copy_(merged), total)


@triton.jit
def _merge_states_kernel(
    out_ptr,  # [num_rows, head_dim]
    out_lse_ptr,  # [num_rows]
    outs_ptr,  # [num_parts, num_rows, head_dim]
    lse_ptr,  # [num_parts, num_rows]
    num_parts,
    num_rows,
    stride_outs_part: tl.int64,
    stride_lse_part: tl.int64,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # program -> BLOCK_R rows
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    in_rows = rows < num_rows
    in_tile = in_rows[:, None] & (dims < HEAD_DIM)[None, :]
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)  # [BLOCK_R]
    total = tl.zeros([BLOCK_R], tl.float32)  # [BLOCK_R]
    merged = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)  # [BLOCK_R, BLOCK_D]
    for part in range(num_parts):
        lse = tl.load(lse_ptr + part * stride_lse_part + rows, mask=in_rows, other=0.0)
        seen = lse > float("-inf")
        value = tl.load(
            outs_ptr + part * stride_outs_part + rows[:, None] * HEAD_DIM + dims[None, :],
            mask=in_tile & seen[:, None],
            other=0.0,
        )  # [BLOCK_R, BLOCK_D]
        highest_now = tl.maximum(highest, lse)
        # While nothing was seen, all are -inf and any finite anchor gives weights of 0.
        anchor = tl.where(highest_now == float("-inf"), 0.0, highest_now)
        old = tl.exp(highest - anchor)
        weight = tl.exp(lse - anchor)
        merged = merged * old[:, None] + value * weight[:, None]
        total = total * old + weight
        highest = highest_now
    # An empty row is 0 / 1, and its lse -inf + log 1.
    total = tl.where(total == 0.0, 1.0, total)
    merged = merged / total[:, None]
    tl.store(
        out_ptr + rows[:, None] * HEAD_DIM + dims[None, :],
        merged.to(out_ptr.dtype.element_ty),
        mask=in_tile,
    )
    tl.store(out_lse_ptr + rows, highest + tl.log(total), mask=in_rows)


def merge_states(
    outs: Tensor, lse: Tensor, *, out: Tensor | None = None, launch_pdl: bool = False
) -> MergedState:
    """outs [num_parts, ..., head_dim], lse [num_parts, ...] float32 -> out [..., head_dim], lse.

    `out` may be of another floating-point dtype. Raises ValueError for shapes, dtypes or layouts
    that the kernel does not take.
    """
    _check(outs, lse, out)
    if not runs_triton(outs):
        return merge_states_reference(outs, lse, out=out)
    head_dim = outs.shape[-1]
    if out is None:
        out = torch.empty(outs.shape[1:], dtype=torch.float32, device=outs.device)
    out_lse = torch.empty(lse.shape[1:], dtype=torch.float32, device=outs.device)
    num_rows = out_lse.numel()
    if num_rows == 0 or head_dim == 0:
        return MergedState(out, out_lse)
    use_pdl = launch_pdl and not is_interpreted()
    _merge_states_kernel[(triton.cdiv(num_rows, BLOCK_ROWS),)](
        out,
        out_lse,
        outs,
        lse,
        outs.shape[0],
        num_rows,
        outs.stride(0),
        lse.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_R=BLOCK_ROWS,
        BLOCK_D=triton.next_power_of_2(head_dim),
        USE_PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return MergedState(out, out_lse)


def _check(outs: Tensor, lse: Tensor, out: Tensor | None) -> None:
    if outs.dtype != torch.float32 or lse.dtype != torch.float32:
        raise ValueError(f"outs are {outs.dtype} and lse {lse.dtype}; both must be float32")
    if outs.shape[:-1] != lse.shape:
        raise ValueError(f"outs {tuple(outs.shape)} need lse {tuple(outs.shape[:-1])}")
    if outs.shape[0] < 1:
        raise ValueError("outs hold 0 parts; give at least one")
    if outs.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {outs.shape[-1]} is above {MAX_HEAD_DIM}; split it")
    if not outs[0].is_contiguous() or not lse[0].is_contiguous():
        raise ValueError("each part of outs and lse must be contiguous; call .contiguous()")
    if out is not None and (out.shape != outs.shape[1:] or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous and {tuple(outs.shape[1:])}")
