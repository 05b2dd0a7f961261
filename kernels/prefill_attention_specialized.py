"""Prefill attention on Hopper with warps of three kinds, for large 16-bit prefills.

One producer warp asks for boxes of Q, K and V; two consumers of four warps compute 64 queries each,
so that one multiplies while the other exponentiates, and each exponentiates the scores of a step
while the tensor cores still weigh the values of the step before. A program takes tile after tile;
the producer is already loading the next one. Keys are walked from the diagonal backwards: only the
first steps need a mask.

Source: Shah et al., "FlashAttention-3" (2024). See prefill_attention.py for what is computed.
Not known here: windows, soft caps, 8-bit pools, block sizes below 64; heads are 64 or 128 wide.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SPECIALIZED_QUERIES = 128
"""Of a program's tile."""
SPECIALIZED_BOX = 64
"""Tokens and dimensions of one bulk copy: the smallest block size it takes."""
SPECIALIZED_HEAD_DIMS = (64, 128)
QUERIES = gl.constexpr(64)
"""Of one consumer; a tile has twice as many."""
KEYS = gl.constexpr(128)
"""Of one step: two boxes."""
BOX = gl.constexpr(64)
STAGES = gl.constexpr(2)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


class SpecializedBoxes(NamedTuple):
    """How bulk copies find queries, and blocks of the pool."""

    query: TensorDescriptor
    pool: TensorDescriptor


def specialized_boxes(query: Tensor, pool: Tensor) -> SpecializedBoxes:
    """For query [num_tokens, num_heads, head_dim] and a contiguous pool."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    box = [1, SPECIALIZED_BOX, SPECIALIZED_BOX]
    sides = pool.view(-1, *pool.shape[4:])
    return SpecializedBoxes(
        TensorDescriptor.from_tensor(query.transpose(0, 1), box, layout),
        TensorDescriptor.from_tensor(sides, box, layout),
    )


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _work_of(
    turn,
    cu_query_lens_ptr,
    seq_lens_ptr,
    num_seqs,
    num_query_tiles,
    NUM_HEADS: gl.constexpr,
):
    """(head, sequence, first query, queries, their first row, tokens, steps) of a turn."""
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    num_tiles = num_query_tiles * num_seqs * NUM_HEADS
    # Later tiles are smaller: dealing them out to and fro evens the programs' shares.
    place = program + (turn % 2) * (num_programs - 1 - 2 * program)
    index = turn * num_programs + place
    is_tile = index < num_tiles
    index = gl.minimum(index, num_tiles - 1)
    head = index % NUM_HEADS
    seq = index // NUM_HEADS % num_seqs
    first_query = (num_query_tiles - 1 - index // NUM_HEADS // num_seqs) * (2 * QUERIES)
    query_begin = gl.load(cu_query_lens_ptr + seq)
    query_len = gl.load(cu_query_lens_ptr + seq + 1) - query_begin
    seq_len = gl.load(seq_lens_ptr + seq)
    num_queries = gl.minimum(query_len - first_query, 2 * QUERIES)
    num_keys = seq_len - query_len + first_query + num_queries
    num_steps = gl.where(is_tile & (num_queries > 0), (num_keys + KEYS - 1) // KEYS, 0)
    return head, seq, first_query, query_len, query_begin, seq_len, num_steps


@gluon.jit
def _produce(
    query_rows,
    pool_rows,
    query_smem,
    key_smem,
    value_smem,
    query_full,
    query_empty,
    key_full,
    key_empty,
    value_full,
    value_empty,
    block_tables_ptr,
    cu_query_lens_ptr,
    seq_lens_ptr,
    num_seqs,
    num_query_tiles,
    num_turns,
    first_row,
    head_rows,
    block_rows,
    stride_table,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HALVES: gl.constexpr,
):
    done = 0
    tiles_done = 0
    for turn in range(num_turns):
        head, seq, first_query, _query_len, query_begin, seq_len, num_steps = _work_of(
            turn, cu_query_lens_ptr, seq_lens_ptr, num_seqs, num_query_tiles, NUM_HEADS
        )
        table_ptr = block_tables_ptr + seq.to(gl.int64) * stride_table
        head_row = first_row + head // GROUP * head_rows
        if num_steps > 0:
            for consumer in gl.static_range(2):
                mbarrier.wait(query_empty.index(consumer), (tiles_done & 1) ^ 1)
                mbarrier.expect(query_full.index(consumer), HALVES * QUERIES * BOX * 2)
                for half in gl.static_range(HALVES):
                    tma.async_copy_global_to_shared(
                        query_rows,
                        [head, query_begin + first_query + consumer * QUERIES, half * BOX],
                        query_full.index(consumer),
                        query_smem.index(consumer * HALVES + half),
                    )
            tiles_done += 1
        token = (num_steps - 1) * KEYS
        for _ in range(num_steps):
            stage = done % STAGES
            phase = (done // STAGES & 1) ^ 1
            # Found one step ahead: a load would hold up the copies.
            block_0, block_1 = _blocks_of(table_ptr, token, seq_len, BLOCK_SIZE)
            # A box that would reach past the sequence's end starts earlier by as much, so that it
            # ends with the last token: what comes before the block is zeros to a bulk copy. One
            # that holds no token lies behind the block, likewise zeros.
            left_0 = seq_len - token
            left_1 = left_0 - BOX
            at_0 = token % BLOCK_SIZE - gl.maximum(BOX - left_0, 0)
            at_1 = (token + BOX) % BLOCK_SIZE - gl.maximum(BOX - left_1, 0)
            at_1 = gl.where(left_1 > 0, at_1, BLOCK_SIZE)
            row_0 = head_row + block_0 * block_rows
            row_1 = head_row + block_1 * block_rows
            mbarrier.wait(key_empty.index(stage), phase)
            mbarrier.expect(key_full.index(stage), HALVES * KEYS * BOX * 2)
            for half in gl.static_range(HALVES):
                slot = (stage * HALVES + half) * 2
                tma.async_copy_global_to_shared(
                    pool_rows, [row_0, at_0, half * BOX], key_full.index(stage),
                    key_smem.index(slot),
                )  # fmt: skip
                tma.async_copy_global_to_shared(
                    pool_rows, [row_1, at_1, half * BOX], key_full.index(stage),
                    key_smem.index(slot + 1),
                )  # fmt: skip
            mbarrier.wait(value_empty.index(stage), phase)
            mbarrier.expect(value_full.index(stage), HALVES * KEYS * BOX * 2)
            for half in gl.static_range(HALVES):
                slot = (stage * HALVES + half) * 2
                tma.async_copy_global_to_shared(
                    pool_rows, [row_0 + 1, at_0, half * BOX], value_full.index(stage),
                    value_smem.index(slot),
                )  # fmt: skip
                tma.async_copy_global_to_shared(
                    pool_rows, [row_1 + 1, at_1, half * BOX], value_full.index(stage),
                    value_smem.index(slot + 1),
                )  # fmt: skip
            done += 1
            token -= KEYS


@gluon.jit
def _blocks_of(table_ptr, token, seq_len, BLOCK_SIZE: gl.constexpr):
    """Of both boxes from `token` on; 0 before the sequence and after it."""
    block_0 = gl.load(table_ptr + token // BLOCK_SIZE, mask=token >= 0, other=0)
    other = token + BOX
    is_inside = (token >= 0) & (other < seq_len)
    block_1 = gl.load(table_ptr + other // BLOCK_SIZE, mask=is_inside, other=0)
    return block_0, block_1


@gluon.jit
def _mask(scores, token, positions, seq_len, LAYOUT: gl.constexpr):
    """-inf where a column's key lies after the row's query, or is none."""
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
    left = seq_len - token - columns // BOX * BOX
    shift = gl.maximum(BOX - gl.maximum(left, 0), 0)
    keys = gl.where(columns % BOX >= shift, columns - shift, 1 << 30)
    return gl.where(
        gl.expand_dims(keys, 0) <= gl.expand_dims(positions - token, 1), scores, float("-inf")
    )


@gluon.jit
def _weigh(scores, highest, total, score_scale, MAY_BE_EMPTY: gl.constexpr):
    """Online softmax of one step: weights, the new state, the factor of what was summed before."""
    highest_now = gl.maximum(highest, gl.max(scores, 1) * score_scale)
    anchor = highest_now
    if MAY_BE_EMPTY:
        anchor = gl.where(highest_now == float("-inf"), 0.0, highest_now)
    weights = _exp2(scores * score_scale - gl.expand_dims(anchor, 1))
    old = _exp2(highest - anchor)
    return weights, highest_now, total * old + gl.sum(weights, 1), old


@gluon.jit
def _step(
    scores_of,
    query,
    keys,
    values,
    key_full,
    key_empty,
    value_full,
    value_empty,
    done,
    weights,
    highest,
    total,
    acc,
    token,
    positions,
    seq_len,
    score_scale,
    MASKED: gl.constexpr,
    LAYOUT: gl.constexpr,
    OUT_LAYOUT: gl.constexpr,
):
    """Scores of step `done` while the weights of the step before meet their values."""
    stage = done % STAGES
    before = (done - 1) % STAGES
    mbarrier.wait(key_full.index(stage), done // STAGES & 1)
    scores = warpgroup_mma(
        query, keys.index(stage).permute((1, 0)), scores_of, use_acc=False, is_async=True
    )
    mbarrier.wait(value_full.index(before), (done - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, values.index(before), acc, is_async=True)
    scores, acc = warpgroup_mma_wait(1, deps=[scores, acc])
    gl.thread_barrier()
    mbarrier.arrive(key_empty.index(stage), count=1)
    if MASKED:
        scores = _mask(scores, token, positions, seq_len, LAYOUT)
    new_weights, highest, total, old = _weigh(scores, highest, total, score_scale, MASKED)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    gl.thread_barrier()
    mbarrier.arrive(value_empty.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, OUT_LAYOUT)), 1)
    weights = gl.convert_layout(new_weights.to(weights.dtype), weights.type.layout)
    return weights, highest, total, acc


@gluon.jit
def _consume(
    out_ptr,
    lse_ptr,
    query_tiles,
    keys,
    values,
    query_full,
    query_empty,
    key_full,
    key_empty,
    value_full,
    value_empty,
    cu_query_lens_ptr,
    seq_lens_ptr,
    sinks_ptr,
    num_seqs,
    num_query_tiles,
    num_turns,
    score_scale,
    stride_out_token,
    stride_out_head,
    CONSUMER: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    DTYPE: gl.constexpr,
):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16]
    )
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT_LAYOUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT_LAYOUT)
    rows = gl.arange(0, QUERIES, layout=ROWS) + CONSUMER * QUERIES
    no_scores = gl.zeros([QUERIES, KEYS], gl.float32, layout=LAYOUT)
    query = query_tiles.index(CONSUMER)
    done = 0
    tiles_done = 0
    for turn in range(num_turns):
        head, _seq, first_query, query_len, query_begin, seq_len, num_steps = _work_of(
            turn, cu_query_lens_ptr, seq_lens_ptr, num_seqs, num_query_tiles, NUM_HEADS
        )
        if num_steps > 0:
            first_position = seq_len - query_len + first_query
            positions = first_position + rows
            last = num_steps - 1
            # Keys up to the first query's own are seen by all; the first step is taken by itself.
            num_masked = gl.maximum(num_steps - (first_position + 1) // KEYS, 1)
            mbarrier.wait(query_full.index(CONSUMER), tiles_done & 1)
            stage = done % STAGES
            mbarrier.wait(key_full.index(stage), done // STAGES & 1)
            scores = warpgroup_mma(
                query, keys.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(0, deps=[scores])
            gl.thread_barrier()
            mbarrier.arrive(key_empty.index(stage), count=1)
            scores = _mask(scores, last * KEYS, positions, seq_len, LAYOUT)
            weights_32, highest, total, _ = _weigh(
                scores,
                gl.full([QUERIES], float("-inf"), gl.float32, layout=ROWS),
                gl.zeros([QUERIES], gl.float32, layout=ROWS),
                score_scale,
                True,
            )
            weights = gl.convert_layout(weights_32.to(DTYPE), WEIGHTS)
            acc = gl.zeros([QUERIES, HEAD_DIM], gl.float32, layout=OUT_LAYOUT)
            done += 1
            for step in range(1, num_masked):
                weights, highest, total, acc = _step(
                    no_scores, query, keys, values, key_full, key_empty, value_full, value_empty,
                    done, weights, highest, total, acc, (last - step) * KEYS, positions, seq_len,
                    score_scale, True, LAYOUT, OUT_LAYOUT,
                )  # fmt: skip
                done += 1
            for step in range(num_masked, num_steps):
                weights, highest, total, acc = _step(
                    no_scores, query, keys, values, key_full, key_empty, value_full, value_empty,
                    done, weights, highest, total, acc, (last - step) * KEYS, positions, seq_len,
                    score_scale, False, LAYOUT, OUT_LAYOUT,
                )  # fmt: skip
                done += 1
            # All keys have met the queries: the next tile's may come.
            mbarrier.arrive(query_empty.index(CONSUMER), count=1)
            tiles_done += 1
            stage = (done - 1) % STAGES
            mbarrier.wait(value_full.index(stage), (done - 1) // STAGES & 1)
            acc = warpgroup_mma(weights, values.index(stage), acc, is_async=True)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            gl.thread_barrier()
            mbarrier.arrive(value_empty.index(stage), count=1)
            in_tile = first_query + rows < query_len
            token_rows = (query_begin + first_query + rows).to(gl.int64)
            if sinks_ptr is not None:
                # The sink may lie far above every score: the larger of both is the anchor.
                sink = gl.load(sinks_ptr + head) * LOG2_E
                highest_now = gl.maximum(highest, sink)
                old = _exp2(highest - highest_now)
                total = total * old + _exp2(sink - highest_now)
                acc = acc * gl.expand_dims(gl.convert_layout(old, OUT_ROWS), 1)
                highest = highest_now
            # Rows past the last query may have seen nothing.
            total = gl.where(in_tile, total, 1.0)
            factor = gl.convert_layout(1.0 / total, OUT_ROWS)
            dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT_LAYOUT))
            out_rows = gl.convert_layout(token_rows, OUT_ROWS)
            out_at = out_ptr + head * stride_out_head
            gl.store(
                out_at + gl.expand_dims(out_rows * stride_out_token, 1) + gl.expand_dims(dims, 0),
                (acc * gl.expand_dims(factor, 1)).to(DTYPE),
                mask=gl.expand_dims(gl.convert_layout(in_tile, OUT_ROWS), 1),
            )
            if lse_ptr is not None:
                log_total = (highest + gl.log2(total)) * LN_2
                gl.store(lse_ptr + token_rows * NUM_HEADS + head, log_total, mask=in_tile)


@gluon.jit(do_not_specialize=["num_seqs", "num_query_tiles"])
def prefill_attention_specialized_kernel(
    out_ptr,  # [num_tokens, num_heads, head_dim]
    lse_ptr,  # [num_tokens, num_heads] float32, or None
    query_rows,  # descriptor of [num_heads, num_tokens, head_dim], boxes of [1, 64, 64]
    pool_rows,  # descriptor of [sides of heads of blocks, block_size, head_dim], likewise
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
    DTYPE: gl.constexpr = pool_rows.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    boxes: gl.constexpr = pool_rows.layout
    query_smem = gl.allocate_shared_memory(DTYPE, [2 * HALVES, 1, QUERIES, BOX], boxes)
    key_smem = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES * 2, 1, BOX, BOX], boxes)
    value_smem = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES * 2, 1, BOX, BOX], boxes)
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
    for i in gl.static_range(2):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=2)
        mbarrier.init(value_full.index(i), count=1)
        mbarrier.init(value_empty.index(i), count=2)
    num_tiles = num_query_tiles * num_seqs * NUM_HEADS
    num_turns = (num_tiles + gl.num_programs(0) - 1) // gl.num_programs(0)
    score_scale = scale * LOG2_E
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    out_ptr, lse_ptr, query_tiles, keys, values, query_full, query_empty,
                    key_full, key_empty, value_full, value_empty, cu_query_lens_ptr, seq_lens_ptr,
                    sinks_ptr, num_seqs, num_query_tiles, num_turns, score_scale,
                    stride_out_token, stride_out_head, 0, NUM_HEADS, HEAD_DIM, DTYPE,
                ),
            ),
            (
                _consume,
                (
                    out_ptr, lse_ptr, query_tiles, keys, values, query_full, query_empty,
                    key_full, key_empty, value_full, value_empty, cu_query_lens_ptr, seq_lens_ptr,
                    sinks_ptr, num_seqs, num_query_tiles, num_turns, score_scale,
                    stride_out_token, stride_out_head, 1, NUM_HEADS, HEAD_DIM, DTYPE,
                ),
            ),
            (
                _produce,
                (
                    query_rows, pool_rows, query_smem, key_smem, value_smem, query_full,
                    query_empty, key_full, key_empty, value_full, value_empty, block_tables_ptr,
                    cu_query_lens_ptr, seq_lens_ptr, num_seqs, num_query_tiles, num_turns,
                    first_row, head_rows, block_rows, stride_table, NUM_HEADS, GROUP, BLOCK_SIZE,
                    HALVES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
