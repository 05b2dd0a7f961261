"""The device side of prefill attention for every dtype and layout: a program's queries.

See prefill_attention.py for what is computed and how tiles are ordered.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention_steps import as_operand, score_scale_of
from kernels.prefill_attention_steps import attend_bulk, attend_gathered, store_tile


@triton.jit(do_not_specialize=["num_seqs", "num_query_tiles"])
def prefill_attention_kernel(
    out_ptr,  # [num_tokens, num_heads, head_dim]
    lse_ptr,  # [num_tokens, num_heads] float32, or None
    query_ptr,  # [num_tokens, num_heads, head_dim]
    kv_ptr,  # [num_blocks, num_kv_heads, 2, block_size, head_dim], one layer
    pool_rows,  # descriptor of [sides of heads of blocks, block_size, head_dim], or None
    block_tables_ptr,  # [num_seqs, max_blocks_per_seq]
    cu_query_lens_ptr,  # [num_seqs + 1]
    seq_lens_ptr,  # [num_seqs]
    sinks_ptr,  # [num_heads] float32, or None
    k_scale_ptr,  # [num_kv_heads] float32, or None
    v_scale_ptr,  # [num_kv_heads] float32, or None
    num_seqs,
    num_query_tiles,
    scale,
    soft_cap,
    sliding_window,
    first_row,
    head_rows,
    block_rows,
    stride_out_token: tl.int64,
    stride_out_head: tl.int64,
    stride_query_token: tl.int64,
    stride_query_head: tl.int64,
    stride_block: tl.int64,
    stride_kv_head: tl.int64,
    stride_kv: tl.int64,
    stride_token: tl.int64,
    stride_table: tl.int64,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PACK: tl.constexpr,
    BOX: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    PACKED: tl.constexpr,
    USE_BULK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # program -> (query tile, last first; sequence; query head or PACK of them)
    BLOCK_N: tl.constexpr = BOX * BOXES
    TILE_TOKENS: tl.constexpr = BLOCK_M // PACK
    NUM_PACKS: tl.constexpr = NUM_HEADS // PACK
    program = tl.program_id(0)
    pack = program % NUM_PACKS
    seq = program // NUM_PACKS % num_seqs
    query_tile = num_query_tiles - 1 - program // NUM_PACKS // num_seqs
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    query_begin = tl.load(cu_query_lens_ptr + seq)
    query_len = tl.load(cu_query_lens_ptr + seq + 1) - query_begin
    seq_len = tl.load(seq_lens_ptr + seq)
    first_query = query_tile * TILE_TOKENS
    if first_query >= query_len:
        return
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens = first_query + rows // PACK  # [BLOCK_M]
    heads = pack * PACK + rows % PACK  # [BLOCK_M]
    kv_head = pack * PACK // GROUP
    positions = seq_len - query_len + tokens
    in_tile = (tokens < query_len)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr
        + (query_begin + tokens).to(tl.int64)[:, None] * stride_query_token
        + heads[:, None] * stride_query_head
        + dims[None, :],
        mask=in_tile,
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    query = as_operand(query, COMPUTE_DTYPE, query_ptr.dtype.element_ty)
    score_scale = score_scale_of(scale, k_scale_ptr, kv_head, HAS_SOFT_CAP)

    first_position = seq_len - query_len + first_query
    last_position = tl.minimum(first_position + TILE_TOKENS, seq_len) - 1
    first_tile = tl.zeros([], tl.int32)
    if HAS_WINDOW:
        first_tile = tl.maximum(first_position - sliding_window + 1, 0) // BLOCK_N
    last_tile = last_position // BLOCK_N + 1
    first_masked_tile = (first_position + 1) // BLOCK_N
    table_ptr = block_tables_ptr + seq.to(tl.int64) * stride_table
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if USE_BULK:
        highest, total, acc = attend_bulk(
            highest, total, acc, query, positions, pool_rows, table_ptr,
            first_tile, last_tile, first_masked_tile, seq_len,
            first_row + kv_head * head_rows, block_rows, score_scale, soft_cap, sliding_window,
            BLOCK_SIZE, BOX, BOXES, BLOCK_D, HAS_WINDOW, HAS_SOFT_CAP, PACKED,
            HAS_WINDOW, NUM_STAGES,
        )  # fmt: skip
    else:
        highest, total, acc = attend_gathered(
            highest, total, acc, query, positions,
            kv_ptr + kv_head.to(tl.int64) * stride_kv_head, table_ptr,
            first_tile, last_tile, first_masked_tile, seq_len,
            score_scale, soft_cap, sliding_window, stride_block, stride_kv, stride_token,
            BLOCK_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, HAS_WINDOW, HAS_SOFT_CAP, PACKED, NUM_STAGES,
        )  # fmt: skip
    store_tile(
        out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, highest, total, acc,
        query_begin + tokens, heads, tokens < query_len, kv_head,
        stride_out_token, stride_out_head, NUM_HEADS, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
