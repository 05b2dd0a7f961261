"""The producer warp of the specialised prefill kernel: Q, K and V by bulk copies.

A step's 128 keys arrive in boxes of up to 64 tokens, each from one block of the pool; boxes of
smaller blocks lie one behind the other and make up the same tile. Copies are asked for in the order
of use: a step's values after the next one's keys.

Not known here: what is computed with them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.prefill_attention_work import BOX, KEYS, QUERIES, STAGES, tile_of, work_of


@gluon.jit
def _boxes_at(
    table_ptr,
    token,
    head_row,
    block_rows,
    seq_len,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Rows of the pool and tokens in them of the boxes of the step that begins at `token`."""
    rows: gl.tuple = ()
    offsets: gl.tuple = ()
    for box in gl.static_range(KEYS // TOKENS):
        first = token + box * TOKENS
        left = seq_len - first
        block = gl.load(table_ptr + first // BLOCK_SIZE, mask=left > 0, other=0)
        # A box that would reach past the sequence's end starts earlier by as much, so that it ends
        # with the last token: what comes before the block is zeros to a bulk copy. One that holds
        # no token lies behind the block, likewise zeros.
        at = first % BLOCK_SIZE - gl.maximum(TOKENS - left, 0)
        rows += (head_row + block * block_rows,)
        offsets += (gl.where(left > 0, at, BLOCK_SIZE),)
    return rows, offsets


@gluon.jit
def _fetch_boxes(
    pool_rows,
    rows,
    offsets,
    smem,  # [STAGES * HALVES * boxes, 1, TOKENS, BOX]
    full,
    stage,
    SIDE: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Ask for the keys (SIDE 0) or values (1) of a step."""
    BOXES: gl.constexpr = KEYS // TOKENS
    mbarrier.expect(full.index(stage), HALVES * KEYS * BOX * 2)
    for box in gl.static_range(BOXES):
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(
                pool_rows,
                [rows[box] + SIDE, offsets[box], half * BOX],
                full.index(stage),
                smem.index((stage * HALVES + half) * BOXES + box),
            )


@gluon.jit
def _fetch_queries(
    query_rows,
    head,
    row,
    smem,  # [2 * HALVES, 1, QUERIES, BOX]
    full,
    empty,
    tiles_done,
    HALVES: gl.constexpr,
):
    for consumer in gl.static_range(2):
        mbarrier.wait(empty.index(consumer), (tiles_done & 1) ^ 1)
        mbarrier.expect(full.index(consumer), HALVES * QUERIES * BOX * 2)
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(
                query_rows,
                [head, row + consumer * QUERIES, half * BOX],
                full.index(consumer),
                smem.index(consumer * HALVES + half),
            )


@gluon.jit
def _fetch_values(
    pool_rows,
    table_ptr,
    token,
    head_row,
    block_rows,
    seq_len,
    value_smem,
    value_full,
    value_empty,
    done,
    BLOCK_SIZE: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
):
    stage = done % STAGES
    # The block table is in the cache: looked up again, it takes no registers in between.
    rows, offsets = _boxes_at(table_ptr, token, head_row, block_rows, seq_len, BLOCK_SIZE, TOKENS)
    mbarrier.wait(value_empty.index(stage), (done // STAGES & 1) ^ 1)
    _fetch_boxes(pool_rows, rows, offsets, value_smem, value_full, stage, 1, HALVES, TOKENS)


@gluon.jit
def produce(
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
    num_tiles,
    first_row,
    head_rows,
    block_rows,
    stride_table,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """All tiles' queries, keys and values, in the order in which they are used."""
    done = 0
    tiles_done = 0
    turn = 0
    tile = tile_of(turn, num_tiles)
    while tile < num_tiles:
        head, seq, first_query, _query_len, query_begin, seq_len, num_steps = work_of(
            tile, cu_query_lens_ptr, seq_lens_ptr, num_seqs, num_query_tiles, NUM_HEADS
        )
        table_ptr = block_tables_ptr + seq.to(gl.int64) * stride_table
        head_row = first_row + head // GROUP * head_rows
        token = (num_steps - 1) * KEYS
        for step in range(num_steps):
            stage = done % STAGES
            # Found before the wait: the loads would hold up the copies.
            rows, offsets = _boxes_at(
                table_ptr, token, head_row, block_rows, seq_len, BLOCK_SIZE, TOKENS
            )
            mbarrier.wait(key_empty.index(stage), (done // STAGES & 1) ^ 1)
            _fetch_boxes(pool_rows, rows, offsets, key_smem, key_full, stage, 0, HALVES, TOKENS)
            if step == 0:
                _fetch_queries(
                    query_rows, head, query_begin + first_query, query_smem, query_full,
                    query_empty, tiles_done, HALVES,
                )  # fmt: skip
                tiles_done += 1
            else:
                # A step's values are needed once the next one's keys have been.
                _fetch_values(
                    pool_rows, table_ptr, token + KEYS, head_row, block_rows, seq_len, value_smem,
                    value_full, value_empty, done - 1, BLOCK_SIZE, HALVES, TOKENS,
                )  # fmt: skip
            done += 1
            token -= KEYS
        if num_steps > 0:
            _fetch_values(
                pool_rows, table_ptr, token + KEYS, head_row, block_rows, seq_len, value_smem,
                value_full, value_empty, done - 1, BLOCK_SIZE, HALVES, TOKENS,
            )  # fmt: skip
        turn += 1
        tile = tile_of(turn, num_tiles)
