"""Consumer warps of the specialised prefill kernel: products, online softmax, results.

Four warps compute 64 queries of a tile; the scores of a step are computed while the weights of the
step before meet their values. See prefill_attention_specialized.py.

Not known here: where keys and values come from.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.prefill_attention_work import KEYS, QUERIES, STAGES, tile_of, work_of

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _mask(scores, token, positions, seq_len, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf where a column's key lies after the row's query, or is none."""
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
    # Tokens of a box that the sequence's end cuts lie at its end.
    left = seq_len - token - columns // TOKENS * TOKENS
    shift = gl.maximum(TOKENS - gl.maximum(left, 0), 0)
    keys = gl.where(columns % TOKENS >= shift, columns - shift, 1 << 30)
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
    TOKENS: gl.constexpr,
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
        scores = _mask(scores, token, positions, seq_len, TOKENS, LAYOUT)
    new_weights, highest, total, old = _weigh(scores, highest, total, score_scale, MASKED)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    gl.thread_barrier()
    mbarrier.arrive(value_empty.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, OUT_LAYOUT)), 1)
    weights = gl.convert_layout(new_weights.to(weights.dtype), weights.type.layout)
    return weights, highest, total, acc


@gluon.jit
def _store(
    out_ptr,  # of the head
    acc,  # [QUERIES, HEAD_DIM]
    factor,  # [QUERIES]
    first_query,
    query_len,
    query_begin,
    stride_out_token,
    HEAD_DIM: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """Rows as wide as they are: the products' own layout would write 16 bytes of each at a time."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    result = gl.convert_layout((acc * gl.expand_dims(factor, 1)).to(DTYPE), WIDE)
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, WIDE))
    queries = first_query + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, WIDE))
    at = out_ptr + (query_begin + queries).to(gl.int64) * stride_out_token
    gl.store(
        gl.expand_dims(at, 1) + gl.expand_dims(dims, 0),
        result,
        mask=gl.expand_dims(queries < query_len, 1),
    )


@gluon.jit
def consume(
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
    turns,
    cu_query_lens_ptr,
    seq_lens_ptr,
    sinks_ptr,
    num_seqs,
    num_query_tiles,
    num_tiles,
    score_scale,
    stride_out_token,
    stride_out_head,
    CONSUMER: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TOKENS: gl.constexpr,
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
    turn = 0
    tile = tile_of(turn, num_tiles)
    while tile < num_tiles:
        head, _seq, first_query, query_len, query_begin, seq_len, num_steps = work_of(
            tile, cu_query_lens_ptr, seq_lens_ptr, num_seqs, num_query_tiles, NUM_HEADS
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
            # One consumer begins a tile after the other; from then on one multiplies while the
            # other exponentiates.
            mbarrier.wait(turns.index(CONSUMER), (tiles_done & 1) ^ (1 - CONSUMER))
            scores = warpgroup_mma(
                query, keys.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
            scores = warpgroup_mma_wait(0, deps=[scores])
            gl.thread_barrier()
            mbarrier.arrive(key_empty.index(stage), count=1)
            scores = _mask(scores, last * KEYS, positions, seq_len, TOKENS, LAYOUT)
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
                    score_scale, True, TOKENS, LAYOUT, OUT_LAYOUT,
                )  # fmt: skip
                done += 1
            for step in range(num_masked, num_steps):
                weights, highest, total, acc = _step(
                    no_scores, query, keys, values, key_full, key_empty, value_full, value_empty,
                    done, weights, highest, total, acc, (last - step) * KEYS, positions, seq_len,
                    score_scale, False, TOKENS, LAYOUT, OUT_LAYOUT,
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
            _store(
                out_ptr + head * stride_out_head,
                acc,
                gl.convert_layout(1.0 / total, OUT_ROWS),
                first_query + CONSUMER * QUERIES,
                query_len,
                query_begin,
                stride_out_token,
                HEAD_DIM,
                DTYPE,
            )
            if lse_ptr is not None:
                token_rows = (query_begin + first_query + rows).to(gl.int64)
                log_total = (highest + gl.log2(total)) * LN_2
                gl.store(lse_ptr + token_rows * NUM_HEADS + head, log_total, mask=in_tile)
        turn += 1
        tile = tile_of(turn, num_tiles)
