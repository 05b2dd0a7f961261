"""Rows of the embedding table for a step's tokens, one rank's part of the vocabulary.

    token[t] = last_tokens[pending_index[t]]   where pending_index[t] >= 0, else token_ids[t]
    out[t]   = table[token[t] - first_token]   where that row is ours, else zeros

A step that is launched before the previous one has finished finds its decode tokens in that
step's samples (`last_tokens`), on the device, through `pending_index`. With the vocabulary split
over ranks each rank holds table rows [first_token, first_token + vocab_size_local) and the sum
over ranks is the embedding.

token_ids [num_tokens] int32 or int64; pending_index [num_tokens] int32; last_tokens [any] int32
or int64; table [vocab_size_local, width], any dtype of 1, 2 or 4 bytes that is only moved; out
[num_tokens, width]; resolved [num_tokens] int32 or int64, the token ids that were looked up.

Bytes: num_tokens * width * itemsize * 2. Bound: copy bandwidth, latency for a few tokens.
Limits: vocab_size_local * width may pass 2^31 elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.platform import is_interpreted, runs_triton

INDEX_DTYPES = (torch.int32, torch.int64)


def embed_reference(
    token_ids: Tensor,
    table: Tensor,
    *,
    first_token: int = 0,
    pending_index: Tensor | None = None,
    last_tokens: Tensor | None = None,
    resolved: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The same in plain torch."""
    tokens = token_ids.long()
    if pending_index is not None and last_tokens is not None and last_tokens.numel():
        sampled = last_tokens.long()[pending_index.clamp(min=0).long()]
        tokens = torch.where(pending_index >= 0, sampled, tokens)
    if resolved is not None:
        resolved.copy_(tokens)
    rows = tokens - first_token
    is_ours = (rows >= 0) & (rows < table.shape[0])
    looked_up = table[torch.where(is_ours, rows, 0)]
    looked_up = torch.where(is_ours[:, None], looked_up, 0)
    return looked_up if out is None else out.copy_(looked_up)


class Tile(NamedTuple):
    columns: int
    num_warps: int


def _tile(num_tokens: int, width: int) -> Tile:
    """Few tokens: short tiles, so that a row arrives over several SMs at once."""
    columns = 2048 if num_tokens >= 132 else 512
    columns = min(columns, triton.next_power_of_2(width))
    return Tile(columns, num_warps=min(max(columns // 256, 1), 4))


@triton.jit
def _embed_kernel(
    token_ids_ptr,  # [num_tokens]
    table_ptr,  # [vocab_size_local, WIDTH]
    pending_index_ptr,  # [num_tokens] or None
    last_tokens_ptr,  # [any] or None
    resolved_ptr,  # [num_tokens] or None
    out_ptr,  # [num_tokens, WIDTH]
    table_stride: tl.int64,
    out_stride: tl.int64,
    first_token,
    vocab_size,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # One program a (token, tile of columns); tiles of a token are neighbours.
    tiles_per_row: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    index = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    tile = tl.program_id(0) % tiles_per_row
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(token_ids_ptr + index).to(tl.int64)
    if pending_index_ptr is not None:
        pending = tl.load(pending_index_ptr + index)
        is_pending = pending >= 0
        sampled = tl.load(last_tokens_ptr + pending, mask=is_pending, other=0).to(tl.int64)
        token = tl.where(is_pending, sampled, token)
    if resolved_ptr is not None:
        resolved = token.to(resolved_ptr.dtype.element_ty)
        tl.store(resolved_ptr + index, resolved, mask=tile == 0)
    row = token - first_token
    is_ours = (row >= 0) & (row < vocab_size)
    is_inside = columns < WIDTH
    table_ptrs = table_ptr + row * table_stride + columns
    values = tl.load(table_ptrs, mask=is_inside & is_ours, other=0.0)
    tl.store(out_ptr + index * out_stride + columns, values, mask=is_inside)


def embed(
    token_ids: Tensor,
    table: Tensor,
    *,
    first_token: int = 0,
    pending_index: Tensor | None = None,
    last_tokens: Tensor | None = None,
    resolved: Tensor | None = None,
    out: Tensor | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """Look up token_ids [num_tokens] -> [num_tokens, width] in the table's dtype.

    `pending_index` and `last_tokens` go together. `resolved` may be `token_ids` itself and must
    not share memory with `last_tokens`. Raises ValueError on what the kernel does not take.
    """
    _check(token_ids, table, pending_index, last_tokens, resolved, out)
    (num_tokens,), (vocab_size, width) = token_ids.shape, table.shape
    if out is None:
        out = torch.empty((num_tokens, width), dtype=table.dtype, device=table.device)
    if not runs_triton(table):
        return embed_reference(
            token_ids,
            table,
            first_token=first_token,
            pending_index=pending_index,
            last_tokens=last_tokens,
            resolved=resolved,
            out=out,
        )
    if num_tokens:
        tile = _tile(num_tokens, width)
        use_pdl = launch_pdl and not is_interpreted()
        _embed_kernel[(num_tokens * triton.cdiv(width, tile.columns),)](
            token_ids,
            table,
            pending_index,
            last_tokens,
            resolved,
            out,
            table.stride(0),
            out.stride(0),
            first_token,
            vocab_size,
            WIDTH=width,
            COLUMNS=tile.columns,
            USE_PDL=use_pdl,
            num_warps=tile.num_warps,
            launch_pdl=use_pdl,
        )
    return out


def _check(
    token_ids: Tensor,
    table: Tensor,
    pending_index: Tensor | None,
    last_tokens: Tensor | None,
    resolved: Tensor | None,
    out: Tensor | None,
) -> None:
    if token_ids.dim() != 1 or table.dim() != 2:
        raise ValueError(
            f"token_ids is {list(token_ids.shape)}, table {list(table.shape)}; "
            f"give [num_tokens] and [vocab_size, width]"
        )
    if (pending_index is None) != (last_tokens is None):
        raise ValueError("pending_index and last_tokens go together; give both or neither")
    if pending_index is not None and pending_index.dtype != torch.int32:
        raise ValueError(f"pending_index is {pending_index.dtype}; give int32")
    for name, indices in (
        ("token_ids", token_ids),
        ("pending_index", pending_index),
        ("last_tokens", last_tokens),
        ("resolved", resolved),
    ):
        if indices is None:
            continue
        if indices.dtype not in INDEX_DTYPES or not indices.is_contiguous():
            raise ValueError(f"{name} is {indices.dtype}; give contiguous int32 or int64")
        if indices.device != table.device:
            raise ValueError(f"{name} is on {indices.device}, the table on {table.device}")
        if name != "last_tokens" and indices.shape != token_ids.shape:
            raise ValueError(f"{name} is {list(indices.shape)}; give {list(token_ids.shape)}")
    if table.stride(1) != 1:
        raise ValueError(f"the table has column stride {table.stride(1)}; make its rows contiguous")
    if out is None:
        return
    shape = (token_ids.shape[0], table.shape[1])
    if out.shape != shape or out.dtype != table.dtype or out.device != table.device:
        raise ValueError(
            f"out is {list(out.shape)} {out.dtype} on {out.device}; "
            f"give {list(shape)} {table.dtype} on {table.device}"
        )
    if out.stride(1) != 1:
        raise ValueError(f"out has column stride {out.stride(1)}; make its rows contiguous")
