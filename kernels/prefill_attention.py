"""Causal attention of many new tokens over their paged context, a ragged batch at a time.

    out = softmax(mask(cap(scale * q K^T))) V,   cap(s) = soft_cap * tanh(s / soft_cap)

query [num_tokens, num_heads, head_dim], the queries of sequence b being rows cu_query_lens[b] to
cu_query_lens[b + 1], the last of its seq_lens[b] tokens; pool [num_blocks, num_kv_heads,
num_layers, 2, block_size, head_dim], block_tables [num_seqs, max_blocks_per_seq] -> out like query.

FLOPs: 4 * num_heads * head_dim * pairs, pairs = sum_b query_len (seq_len - (query_len - 1) / 2);
bytes: K and V once a sequence, 2 * sum(seq_lens) * num_kv_heads * head_dim * element size, and the
queries and outputs. Bound by the tensor cores.
Source: Dao, "FlashAttention-2" (2023); Shah et al., "FlashAttention-3" (2024).

One program takes a tile of queries of one head (or of all heads of a group, for few queries) from
the first key it sees to its own diagonal; the latest queries, which see most, start first. Where
the pool is contiguous and a block has 64 tokens or more, K and V arrive by bulk tensor copies,
otherwise by one address a row. Large 16-bit prefills on Hopper have a kernel of their own
(prefill_attention_specialized.py), for blocks of 16 tokens or more. No slot past a sequence's end
is ever read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention_arguments import (
    FP8,
    AttentionOptions,
    check_attention,
    compute_dtype,
    is_hopper,
    num_multiprocessors,
)
from kernels.attention_reference import attend, gather_kv
from kernels.platform import is_interpreted, runs_triton
from kernels.prefill_attention_kernel import prefill_attention_kernel
from kernels.prefill_attention_specialized import (
    SPECIALIZED_HEAD_DIMS,
    SPECIALIZED_MIN_BLOCK,
    SPECIALIZED_QUERIES,
    SpecializedBoxes,
    prefill_attention_specialized_kernel,
    specialized_boxes,
)
from kernels.prefill_attention_tile import PrefillTile, candidate_tiles, prefill_tile

__all__ = ["PrefillTile", "candidate_tiles", "prefill_attention", "prefill_attention_reference"]

MIN_BULK_BLOCK = 64
"""Tokens of a block from which bulk copies keep the tensor cores fed."""


def prefill_attention_reference(
    query: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    cu_query_lens: Tensor,
    seq_lens: Tensor,
    *,
    layer: int,
    scale: float = 1.0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The formula above, one sequence at a time; reads the lengths on the host."""
    if out is None:
        out = torch.empty_like(query)
    bounds = cu_query_lens.tolist()
    for seq, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(bounds[seq], bounds[seq + 1])
        if rows.start == rows.stop:
            continue
        keys, values = gather_kv(pool, block_tables[seq], seq_len, layer, k_scale, v_scale)
        result, log_total = attend(
            query[rows],
            keys,
            values,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
        )
        out[rows] = result.to(out.dtype)
        if lse is not None:
            lse[rows] = log_total
    return out


def prefill_attention(
    query: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    cu_query_lens: Tensor,
    seq_lens: Tensor,
    *,
    layer: int,
    max_query_len: int,
    scale: float = 1.0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    tile: PrefillTile | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """query [num_tokens, num_heads, head_dim] -> the same shape; see the top of the file.

    `seq_lens` counts cached tokens and new ones, whose K and V are in the pool already;
    `max_query_len` bounds the new tokens of one sequence and sets the grid. A sequence without
    new tokens adds no rows; rows outside `cu_query_lens` are not written. Options as in
    decode_attention. Raises ValueError for what the kernel does not take.
    """
    check_attention(
        query, pool, block_tables, seq_lens, layer=layer, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
    )  # fmt: skip
    _check_query_lens(cu_query_lens, seq_lens, max_query_len)
    if scale <= 0:
        raise ValueError(f"scale {scale} must be above 0: the largest score is sought unscaled")
    if not runs_triton(query):
        return prefill_attention_reference(
            query, pool, block_tables, cu_query_lens, seq_lens, layer=layer, scale=scale,
            sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks,
            k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
        )  # fmt: skip
    num_tokens, num_heads, head_dim = query.shape
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0 or seq_lens.numel() == 0 or max_query_len == 0:
        return out
    group = num_heads // pool.shape[1]
    tile = tile or prefill_tile(head_dim, pool.element_size(), max_query_len, group)
    batch = _Batch(out, lse, query, pool, block_tables, cu_query_lens, seq_lens)
    options = AttentionOptions(layer, scale, sliding_window, soft_cap, sinks, k_scale, v_scale)
    boxes = _specialized_boxes(query, pool, tile, options)
    if boxes is not None:
        _launch_specialized(batch, options, boxes, max_query_len)
    else:
        use_pdl = launch_pdl and not is_interpreted()
        _launch_general(batch, options, tile, max_query_len, _pool_rows(pool, tile), use_pdl)
    return out


class _Batch(NamedTuple):
    out: Tensor
    lse: Tensor | None
    query: Tensor
    pool: Tensor
    block_tables: Tensor
    cu_query_lens: Tensor
    seq_lens: Tensor


def _launch_general(
    batch: _Batch,
    options: AttentionOptions,
    tile: PrefillTile,
    max_query_len: int,
    rows: TensorDescriptor | None,
    use_pdl: bool,
) -> None:
    out, query, pool = batch.out, batch.query, batch.pool
    num_seqs, num_heads = batch.seq_lens.numel(), query.shape[1]
    num_query_tiles = triton.cdiv(max_query_len, tile.block_m // tile.pack)
    box = tile.block_n if rows is None else rows.block_shape[1]
    kv = pool[:, :, options.layer]
    prefill_attention_kernel[(num_query_tiles * num_seqs * (num_heads // tile.pack),)](
        out,
        batch.lse,
        query,
        kv,
        rows,
        batch.block_tables,
        batch.cu_query_lens,
        batch.seq_lens,
        options.sinks,
        options.k_scale,
        options.v_scale,
        num_seqs,
        num_query_tiles,
        options.scale,
        options.soft_cap,
        options.sliding_window,
        2 * options.layer,
        2 * pool.shape[2],
        2 * pool.shape[2] * pool.shape[1],
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        *kv.stride()[:4],
        batch.block_tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP=num_heads // pool.shape[1],
        BLOCK_SIZE=pool.shape[4],
        HEAD_DIM=query.shape[2],
        BLOCK_M=tile.block_m,
        PACK=tile.pack,
        BOX=box,
        BOXES=tile.block_n // box,
        BLOCK_D=_width(query),
        HAS_WINDOW=options.sliding_window > 0,
        HAS_SOFT_CAP=options.soft_cap > 0,
        COMPUTE_DTYPE=compute_dtype(query, pool),
        PACKED=pool.dtype == FP8 and query.dtype != torch.float32 and not is_interpreted(),
        USE_BULK=rows is not None,
        NUM_STAGES=tile.num_stages,
        USE_PDL=use_pdl,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        launch_pdl=use_pdl,
    )


def _launch_specialized(
    batch: _Batch, options: AttentionOptions, boxes: SpecializedBoxes, max_query_len: int
) -> None:
    out, query, pool = batch.out, batch.query, batch.pool
    num_seqs, num_heads = batch.seq_lens.numel(), query.shape[1]
    num_query_tiles = triton.cdiv(max_query_len, SPECIALIZED_QUERIES)
    grid = min(num_multiprocessors(query.device), num_query_tiles * num_seqs * num_heads)
    prefill_attention_specialized_kernel[(grid,)](
        out,
        batch.lse,
        boxes.query,
        boxes.pool,
        batch.block_tables,
        batch.cu_query_lens,
        batch.seq_lens,
        options.sinks,
        num_seqs,
        num_query_tiles,
        options.scale,
        2 * options.layer,
        2 * pool.shape[2],
        2 * pool.shape[2] * pool.shape[1],
        out.stride(0),
        out.stride(1),
        batch.block_tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP=num_heads // pool.shape[1],
        BLOCK_SIZE=pool.shape[4],
        HEAD_DIM=query.shape[2],
        num_warps=4,
    )


def _width(query: Tensor) -> int:
    return max(16, triton.next_power_of_2(query.shape[2]))


def _pool_rows(pool: Tensor, tile: PrefillTile) -> TensorDescriptor | None:
    """[sides of heads of blocks, block_size, head_dim], if bulk copies can fetch blocks of it."""
    block_size, head_dim = pool.shape[4:]
    box = min(tile.block_n, block_size)
    if (
        not tile.is_bulk
        or pool.dtype == torch.float32
        or block_size < MIN_BULK_BLOCK
        or tile.block_n > 2 * box
        or not pool.is_contiguous()
        or pool.data_ptr() % 16
        or head_dim * pool.element_size() % 16
    ):
        return None
    sides = pool.view(-1, block_size, head_dim)
    return TensorDescriptor.from_tensor(sides, [1, box, max(16, triton.next_power_of_2(head_dim))])


def _specialized_boxes(
    query: Tensor, pool: Tensor, tile: PrefillTile, options: AttentionOptions
) -> SpecializedBoxes | None:
    """Descriptors for the specialised kernel, if it can take the call."""
    if (
        not tile.is_specialized
        or is_interpreted()
        or options.sliding_window
        or options.soft_cap
        or pool.dtype != query.dtype
        or query.element_size() != 2
        or query.shape[2] not in SPECIALIZED_HEAD_DIMS
        or pool.shape[4] < SPECIALIZED_MIN_BLOCK
        or not pool.is_contiguous()
        or not is_hopper(query.device)
    ):
        return None
    strides = (query.stride(0) * query.element_size(), query.stride(1) * query.element_size())
    if query.data_ptr() % 16 or pool.data_ptr() % 16 or any(stride % 16 for stride in strides):
        return None
    return specialized_boxes(query, pool)


def _check_query_lens(cu_query_lens: Tensor, seq_lens: Tensor, max_query_len: int) -> None:
    if cu_query_lens.dtype != torch.int32 or not cu_query_lens.is_contiguous():
        raise ValueError(f"cu_query_lens is {cu_query_lens.dtype}; it must be contiguous int32")
    if cu_query_lens.shape != (seq_lens.numel() + 1,):
        raise ValueError(
            f"cu_query_lens is {tuple(cu_query_lens.shape)}, for {seq_lens.numel()} sequences it "
            f"must be ({seq_lens.numel() + 1},)"
        )
    if cu_query_lens.device != seq_lens.device:
        raise ValueError(f"cu_query_lens is on {cu_query_lens.device}, move it to the seq_lens")
    if max_query_len < 0:
        raise ValueError(f"max_query_len {max_query_len} must not be negative")
