"""Steps of prefill attention on the device: keys by rows or by bulk copies, masks, the result.

Not known here: which tile a program takes, and in what order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention_steps import LN_2, LOG2_E, cap_scores, finite_anchor, widen


@triton.jit
def _mask_scores(
    scores,  # [BLOCK_M, keys]
    columns,  # [keys] position of each key relative to its tile; negative: not a key
    positions,  # [BLOCK_M] position of each query relative to the tile
    sliding_window,
    HAS_WINDOW: tl.constexpr,
):
    """-inf where a key lies after its query, before its window, or is none."""
    # One comparison for both ends: as unsigned, what is below zero lies above every limit.
    limits = tl.maximum(positions + 1, 0).to(tl.uint32)
    is_seen = columns.to(tl.uint32)[None, :] < limits[:, None]
    if HAS_WINDOW:
        is_seen &= columns[None, :] > (positions - sliding_window)[:, None]
    return tl.where(is_seen, scores, float("-inf"))


@triton.jit
def attend_gathered(
    highest,
    total,
    acc,
    query,  # [BLOCK_M, BLOCK_D]
    positions,  # [BLOCK_M]
    kv_ptr,
    table_ptr,
    first_tile,
    last_tile,
    first_masked_tile,
    seq_len,
    score_scale,
    soft_cap,
    sliding_window,
    stride_block: tl.int64,
    stride_kv: tl.int64,
    stride_token: tl.int64,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    PACKED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Tiles [first, last) by one address a row, for any block size; reads no slot past the end."""
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    for tile in tl.range(first_tile, last_tile, num_stages=NUM_STAGES):
        tokens = tile * BLOCK_N + columns
        in_seq = tokens < seq_len
        block = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=in_seq, other=0).to(tl.int64)
        rows = block * stride_block + (tokens % BLOCK_SIZE) * stride_token
        at = kv_ptr + rows[:, None] + dims[None, :]
        mask = in_seq[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (dims < HEAD_DIM)[None, :]
        keys = widen(tl.load(at, mask=mask, other=0.0), query.dtype, PACKED)
        scores = tl.dot(query, keys.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        factor = score_scale
        if HAS_SOFT_CAP:
            scores = cap_scores(scores * score_scale, soft_cap)
            factor = LOG2_E
        if HAS_WINDOW or tile >= first_masked_tile:
            scores = _mask_scores(
                scores, columns, positions - tile * BLOCK_N, sliding_window, HAS_WINDOW
            )
        highest_now = tl.maximum(highest, tl.max(scores, 1) * factor)
        anchor = finite_anchor(highest_now, HAS_WINDOW)
        weights = tl.exp2(scores * factor - anchor[:, None])
        old = tl.exp2(highest - anchor)
        total = total * old + tl.sum(weights, 1)
        values = widen(tl.load(at + stride_kv, mask=mask, other=0.0), query.dtype, PACKED)
        acc = tl.dot(weights.to(query.dtype), values, acc * old[:, None], input_precision="ieee")
        highest = highest_now
    return highest, total, acc


@triton.jit
def _bulk_scores(
    query,  # [BLOCK_M, BLOCK_D]
    positions,  # [BLOCK_M]
    pool_rows,  # descriptor of [sides of heads of blocks, block_size, head_dim]
    table_ptr,
    token,
    seq_len,
    is_masked,
    first_row,
    block_rows,
    score_scale,
    soft_cap,
    sliding_window,
    BLOCK_SIZE: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    PACKED: tl.constexpr,
    MASK_ALL: tl.constexpr,
):
    """Scores of BOX keys from `token` on, and where in the pool their values lie.

    A box that would reach past the sequence's end starts earlier by as much, so that it ends with
    the last token: what comes before the block is zeros to a bulk copy, and slots past the end,
    which hold anything, NaN included, are never read.
    """
    num_keys = seq_len - token
    block = tl.load(table_ptr + token // BLOCK_SIZE, mask=num_keys > 0, other=0)
    row = block * block_rows + first_row
    shift = tl.minimum(num_keys, BOX) - BOX
    offset = token % BLOCK_SIZE + shift
    keys = widen(pool_rows.load([row, offset, 0]).reshape(BOX, BLOCK_D), query.dtype, PACKED)
    scores = tl.dot(query, keys.T, input_precision="ieee")  # [BLOCK_M, BOX]
    if HAS_SOFT_CAP:
        scores = cap_scores(scores * score_scale, soft_cap)
    columns = tl.arange(0, BOX) + shift
    if MASK_ALL or is_masked:
        scores = _mask_scores(scores, columns, positions - token, sliding_window, HAS_WINDOW)
    return scores, row, offset


@triton.jit
def attend_bulk(
    highest,
    total,
    acc,
    query,  # [BLOCK_M, BLOCK_D]
    positions,  # [BLOCK_M]
    pool_rows,  # descriptor, boxes of [1, BOX, BLOCK_D]
    table_ptr,
    first_tile,
    last_tile,
    first_masked_tile,
    seq_len,
    first_row,
    block_rows,
    score_scale,
    soft_cap,
    sliding_window,
    BLOCK_SIZE: tl.constexpr,
    BOX: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    PACKED: tl.constexpr,
    MASK_ALL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Tiles [first, last) by bulk copies, of one or two boxes each of K and V."""
    factor = score_scale
    if HAS_SOFT_CAP:
        factor = LOG2_E
    for tile in tl.range(first_tile, last_tile, num_stages=NUM_STAGES):
        token = tile * (BOX * BOXES)
        is_masked = tile >= first_masked_tile
        scores, row, offset = _bulk_scores(
            query, positions, pool_rows, table_ptr, token, seq_len, is_masked, first_row,
            block_rows, score_scale, soft_cap, sliding_window, BLOCK_SIZE, BOX, BLOCK_D,
            HAS_WINDOW, HAS_SOFT_CAP, PACKED, MASK_ALL,
        )  # fmt: skip
        if BOXES == 2:
            scores_1, row_1, offset_1 = _bulk_scores(
                query, positions, pool_rows, table_ptr, token + BOX, seq_len, is_masked, first_row,
                block_rows, score_scale, soft_cap, sliding_window, BLOCK_SIZE, BOX, BLOCK_D,
                HAS_WINDOW, HAS_SOFT_CAP, PACKED, MASK_ALL,
            )  # fmt: skip
            highest_here = tl.max(tl.maximum(scores, scores_1), 1)
        else:
            highest_here = tl.max(scores, 1)
        highest_now = tl.maximum(highest, highest_here * factor)
        anchor = finite_anchor(highest_now, HAS_WINDOW)
        old = tl.exp2(highest - anchor)
        weights = tl.exp2(scores * factor - anchor[:, None])
        if BOXES == 2:
            weights_1 = tl.exp2(scores_1 * factor - anchor[:, None])
            total = total * old + tl.sum(weights + weights_1, 1)
        else:
            total = total * old + tl.sum(weights, 1)
        values = pool_rows.load([row + 1, offset, 0]).reshape(BOX, BLOCK_D)
        values = widen(values, query.dtype, PACKED)
        acc = tl.dot(weights.to(query.dtype), values, acc * old[:, None], input_precision="ieee")
        if BOXES == 2:
            values_1 = pool_rows.load([row_1 + 1, offset_1, 0]).reshape(BOX, BLOCK_D)
            values_1 = widen(values_1, query.dtype, PACKED)
            acc = tl.dot(weights_1.to(query.dtype), values_1, acc, input_precision="ieee")
        highest = highest_now
    return highest, total, acc


@triton.jit
def store_tile(
    out_ptr,
    lse_ptr,
    sinks_ptr,
    v_scale_ptr,
    highest,
    total,
    acc,
    rows,  # [BLOCK_M] row of the output
    heads,  # [BLOCK_M]
    in_tile,  # [BLOCK_M]
    kv_head,
    stride_out_token: tl.int64,
    stride_out_head: tl.int64,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_D)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads) * LOG2_E
        # The sink may lie far above every score: the larger of both is the anchor.
        highest_now = tl.maximum(highest, sink)
        anchor = finite_anchor(highest_now, True)
        old = tl.exp2(highest - anchor)
        total = total * old + tl.exp2(sink - anchor)
        acc = acc * old[:, None]
        highest = highest_now
    # Rows past the last query may have seen nothing.
    total = tl.where(in_tile, total, 1.0)
    factor = 1.0 / total
    if v_scale_ptr is not None:
        factor *= tl.load(v_scale_ptr + kv_head)
    rows = rows.to(tl.int64)
    mask = in_tile[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dims < HEAD_DIM)[None, :]
    tl.store(
        out_ptr
        + rows[:, None] * stride_out_token
        + heads[:, None] * stride_out_head
        + dims[None, :],
        (acc * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=mask,
    )
    if lse_ptr is not None:
        log_total = (highest + tl.log2(total)) * LN_2
        tl.store(lse_ptr + rows * NUM_HEADS + heads, log_total, mask=in_tile)
