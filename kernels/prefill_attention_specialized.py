"""Prefill attention on Hopper with warps of three kinds, for large 16-bit prefills.

One producer warp asks for boxes of Q, K and V; two consumers of four warps compute 64 queries each,
so that one multiplies while the other exponentiates. A program takes tile after tile; the producer
is already loading the next one. Keys are walked from the diagonal backwards: only the first steps
need a mask.

Large prefills run at the power limit of an H200, with clocks well below their highest: less work
around the products helps, more of them at a time does not.

Source: Shah et al., "FlashAttention-3" (2024). See prefill_attention.py for what is computed.
Not known here: windows, soft caps, 8-bit pools, blocks below 16 tokens; heads are 64 or 128 wide.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.prefill_attention_consumer import LOG2_E, consume
from kernels.prefill_attention_producer import produce
from kernels.prefill_attention_work import BOX, KEYS, QUERIES, STAGES

SPECIALIZED_QUERIES = 128
"""Of a program's tile."""
SPECIALIZED_BOX = 64
"""Dimensions of one bulk copy, and at most as many tokens."""
SPECIALIZED_MIN_BLOCK = 16
"""Tokens of a block: 16 bulk copies a step for its keys, and as many for its values."""
SPECIALIZED_HEAD_DIMS = (64, 128)


class SpecializedBoxes(NamedTuple):
    """How bulk copies find queries, and blocks of the pool."""

    query: TensorDescriptor
    pool: TensorDescriptor


def specialized_boxes(query: Tensor, pool: Tensor) -> SpecializedBoxes:
    """For query [num_tokens, num_heads, head_dim] and a contiguous pool."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    sides = pool.view(-1, *pool.shape[4:])
    tokens = min(pool.shape[4], SPECIALIZED_BOX)
    return SpecializedBoxes(
        TensorDescriptor.from_tensor(
            query.transpose(0, 1), [1, SPECIALIZED_BOX, SPECIALIZED_BOX], layout
        ),
        TensorDescriptor.from_tensor(sides, [1, tokens, SPECIALIZED_BOX], layout),
    )


@gluon.jit(do_not_specialize=["num_seqs", "num_query_tiles"])
def prefill_attention_specialized_kernel(
    out_ptr,  # [num_tokens, num_heads, head_dim]
    lse_ptr,  # [num_tokens, num_heads] float32, or None
    query_rows,  # descriptor of [num_heads, num_tokens, head_dim], boxes of [1, 64, 64]
    pool_rows,  # descriptor of [sides of heads of blocks, block_size, head_dim], [1, TOKENS, 64]
    block_tables_ptr,  # [num_seqs, max_blocks_per_seq]
    cu_query_lens_ptr,  # [num_seqs + 1]
    seq_lens_ptr,  # [num_seqs]
    sinks_ptr,  # [num_heads] float32, or None
    num_seqs,
    num_query_tiles,
    scale,
    first_row,
    head_rows,
    block_rows,
    stride_out_token: gl.int64,
    stride_out_head: gl.int64,
    stride_table: gl.int64,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    # program -> every num_programs-th (query tile, last first; sequence; query head)
    HALVES: gl.constexpr = HEAD_DIM // BOX
    TOKENS: gl.constexpr = BLOCK_SIZE if BLOCK_SIZE < 64 else 64
    BOXES: gl.constexpr = KEYS // TOKENS
    DTYPE: gl.constexpr = pool_rows.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    boxes: gl.constexpr = pool_rows.layout
    query_smem = gl.allocate_shared_memory(DTYPE, [2 * HALVES, 1, QUERIES, BOX], boxes)
    key_smem = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES * BOXES, 1, TOKENS, BOX], boxes)
    value_smem = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES * BOXES, 1, TOKENS, BOX], boxes)
    # Half a head's dimensions of all rows lie together: what tiles of 128-byte rows are made of.
    query_tiles = query_smem._reinterpret(DTYPE, [2, QUERIES, HEAD_DIM], TILE)
    keys = key_smem._reinterpret(DTYPE, [STAGES, KEYS, HEAD_DIM], TILE)
    values = value_smem._reinterpret(DTYPE, [STAGES, KEYS, HEAD_DIM], TILE)
    query_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    query_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=2)
        mbarrier.init(value_full.index(i), count=1)
        mbarrier.init(value_empty.index(i), count=2)
    num_tiles = num_query_tiles * num_seqs * NUM_HEADS
    score_scale = scale * LOG2_E
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_ptr, lse_ptr, query_tiles, keys, values, query_full, query_empty,
                    key_full, key_empty, value_full, value_empty, turns, cu_query_lens_ptr,
                    seq_lens_ptr, sinks_ptr, num_seqs, num_query_tiles, num_tiles, score_scale,
                    stride_out_token, stride_out_head, 0, NUM_HEADS, HEAD_DIM, TOKENS, DTYPE,
                ),
            ),
            (
                consume,
                (
                    out_ptr, lse_ptr, query_tiles, keys, values, query_full, query_empty,
                    key_full, key_empty, value_full, value_empty, turns, cu_query_lens_ptr,
                    seq_lens_ptr, sinks_ptr, num_seqs, num_query_tiles, num_tiles, score_scale,
                    stride_out_token, stride_out_head, 1, NUM_HEADS, HEAD_DIM, TOKENS, DTYPE,
                ),
            ),
            (
                produce,
                (
                    query_rows, pool_rows, query_smem, key_smem, value_smem, query_full,
                    query_empty, key_full, key_empty, value_full, value_empty, block_tables_ptr,
                    cu_query_lens_ptr, seq_lens_ptr, num_seqs, num_query_tiles, num_tiles,
                    first_row, head_rows, block_rows, stride_table, NUM_HEADS, GROUP, BLOCK_SIZE,
                    HALVES, TOKENS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
