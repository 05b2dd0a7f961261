"""Online softmax of one sequence's new token over tiles of its paged keys and values.

8-bit keys and values may come as int16 pairs (fp8_pairs.py): even and odd dimensions are then two
products of half the width each, and are joined at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention_steps import LOG2_E, cap_scores, finite_anchor
from kernels.fp8_pairs import even_values, odd_values


@triton.jit
def blocks_of_tile(
    table_ptr,  # [max_blocks_per_seq]
    tile,
    num_tokens,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The block that holds the tile, or [BLOCK_N] blocks of its tokens where it takes several."""
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + tile * BLOCK_N // BLOCK_SIZE)
    else:
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < num_tokens, other=0)


@triton.jit
def _load_tile(
    kv_ptr,  # one KV head of the pool
    blocks,  # of blocks_of_tile
    tile,
    is_valid,  # [BLOCK_N]
    stride_block: tl.int64,
    stride_kv: tl.int64,
    stride_token: tl.int64,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NOTHING: tl.constexpr,
    TOKEN_ALIGNMENT: tl.constexpr,
):
    """Keys and values of a tile, [BLOCK_N, BLOCK_W] each; NOTHING for tokens not valid."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_W)
    # TOKEN_ALIGNMENT: a stride of 40 pairs allows loads of 16 bytes, which it does not tell itself.
    if BLOCK_SIZE % BLOCK_N == 0:
        # One address a tile: what differs from row to row is the same in every tile.
        first = blocks.to(tl.int64) * stride_block
        if BLOCK_SIZE != BLOCK_N:
            first += tile * BLOCK_N % BLOCK_SIZE * stride_token
        offsets = tl.multiple_of(columns * stride_token.to(tl.int32), TOKEN_ALIGNMENT)
        at = kv_ptr + first + (offsets[:, None] + dims[None, :])
    else:
        places = (tile * BLOCK_N + columns) % BLOCK_SIZE
        offsets = tl.multiple_of(places * stride_token.to(tl.int32), TOKEN_ALIGNMENT)
        rows = blocks.to(tl.int64) * stride_block + offsets
        at = kv_ptr + rows[:, None] + dims[None, :]
    # Slots past the end hold anything, NaN included, so they are never read.
    mask = is_valid[:, None]
    if WIDTH != BLOCK_W:
        mask = mask & (dims < WIDTH)[None, :]
    keys = tl.load(at, mask=mask, other=NOTHING)
    values = tl.load(at + stride_kv, mask=mask, other=NOTHING)
    return keys, values


@triton.jit
def _score(
    query,  # [BLOCK_G, BLOCK_W]: all dimensions, or the even ones
    query_odd,  # [BLOCK_G, BLOCK_W]: the odd ones
    keys,  # [BLOCK_N, BLOCK_W]
    PRECISION: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """query keys^T, [BLOCK_G, BLOCK_N] float32."""
    if IS_PAIRED:
        pairs = keys.T
        scores = tl.dot(query, even_values(pairs, INTERPRETED))
        return tl.dot(query_odd, odd_values(pairs, INTERPRETED), scores)
    else:
        return tl.dot(query, keys.to(query.dtype).T, input_precision=PRECISION)


@triton.jit
def attend_tiles(
    query,  # [BLOCK_G, BLOCK_D]
    kv_ptr,  # one KV head of the pool; its elements are pairs if IS_PAIRED
    table_ptr,  # [max_blocks_per_seq]
    blocks,  # of the first tile
    first_tile,
    last_tile,
    num_tokens,
    first_token,
    score_scale,
    soft_cap,
    stride_block: tl.int64,
    stride_kv: tl.int64,
    stride_token: tl.int64,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    MAY_BE_EMPTY: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TOKEN_ALIGNMENT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Softmax state (highest log2 score, sum, weighted values) over tiles [first, last)."""
    VALUES: tl.constexpr = 2 if IS_PAIRED else 1
    WIDTH: tl.constexpr = HEAD_DIM // VALUES
    BLOCK_W: tl.constexpr = BLOCK_D // VALUES
    NOTHING: tl.constexpr = 0 if IS_PAIRED else 0.0
    query_odd = query
    if IS_PAIRED:
        query, query_odd = tl.split(tl.reshape(query, (BLOCK_G, BLOCK_W, 2)))
    highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    # A sum for each column: adding them up in every tile would wait for all warps once more.
    totals = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    acc_odd = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    for tile in tl.range(first_tile, last_tile, num_stages=NUM_STAGES):
        tokens = tile * BLOCK_N + columns
        is_valid = tokens < num_tokens
        if HAS_WINDOW:
            is_valid &= tokens >= first_token
        keys, values = _load_tile(
            kv_ptr, blocks, tile, is_valid, stride_block, stride_kv, stride_token,
            BLOCK_SIZE, BLOCK_N, WIDTH, BLOCK_W, NOTHING, TOKEN_ALIGNMENT,
        )  # fmt: skip
        # Read one tile ahead: addresses that wait for their block would take every other stage.
        blocks = blocks_of_tile(
            table_ptr, tl.minimum(tile + 1, last_tile - 1), num_tokens, BLOCK_SIZE, BLOCK_N
        )
        scores = _score(query, query_odd, keys, PRECISION, IS_PAIRED, INTERPRETED) * score_scale
        if HAS_SOFT_CAP:
            scores = cap_scores(scores, soft_cap) * LOG2_E
        scores = tl.where(is_valid[None, :], scores, float("-inf"))  # [BLOCK_G, BLOCK_N]
        highest_now = tl.maximum(highest, tl.max(scores, 1))
        anchor = finite_anchor(highest_now, MAY_BE_EMPTY)
        weights = tl.exp2(scores - anchor[:, None])
        old = tl.exp2(highest - anchor)
        totals = totals * old[:, None] + weights
        weights = weights.to(query.dtype)
        if IS_PAIRED:
            acc = tl.dot(weights, even_values(values, INTERPRETED), acc * old[:, None])
            acc_odd = tl.dot(weights, odd_values(values, INTERPRETED), acc_odd * old[:, None])
        else:
            acc = tl.dot(
                weights, values.to(query.dtype), acc * old[:, None], input_precision=PRECISION
            )
        highest = highest_now
    if IS_PAIRED:
        acc = tl.reshape(tl.join(acc, acc_odd), (BLOCK_G, BLOCK_D))
    return highest, tl.sum(totals, 1), acc
