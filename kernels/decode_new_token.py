"""What fused decode attention does with a sequence's new token on the device.

Its query heads are rotated where they are loaded; its key is rotated and, with its value, takes
part in the softmax from registers and is stored to the pool for later steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention_steps import LOG2_E, cap_scores

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def load_angles(
    cos_sin_ptr,  # [max_positions, head_dim]: cosines of half a head, then sines
    position,
    stride_position: tl.int64,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Cosine and signed sine of every dimension, [1, BLOCK_D] each."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, BLOCK_D)[None, :]
    at = cos_sin_ptr + position.to(tl.int64) * stride_position + dims % HALF
    cos = tl.load(at, mask=dims < HEAD_DIM, other=0.0)
    sin = tl.load(at + HALF, mask=dims < HEAD_DIM, other=0.0)
    return cos, tl.where(dims < HALF, -sin, sin)


@triton.jit
def load_rotated(
    row_ptrs,  # [ROWS, 1] heads of one token
    is_row,  # [ROWS, 1]
    cos,  # [1, BLOCK_D]
    sin,  # [1, BLOCK_D], negative in the first half
    gain_ptr,  # [head_dim], or None
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Heads, normalised where there is a gain and rotated: float32 [ROWS, BLOCK_D]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, BLOCK_D)[None, :]
    partners = tl.where(dims < HALF, dims + HALF, dims - HALF)
    mask = is_row & (dims < HEAD_DIM)
    here = tl.load(row_ptrs + dims, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(row_ptrs + partners, mask=mask, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        rstd = tl.rsqrt(tl.sum(here * here, 1) / HEAD_DIM + eps)[:, None]
        here *= rstd * tl.load(gain_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + partners, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        partner *= rstd * gain
    return here * cos + partner * sin


@triton.jit
def as_stored(values, scale_ptr, kv_head, DTYPE: tl.constexpr):
    """Key or value as the pool holds it: divided by the head's scale, saturated, rounded."""
    if scale_ptr is not None:
        values = values / tl.load(scale_ptr + kv_head)
    if tl.float8e4nv == DTYPE:
        # A NaN would poison keys that later steps read in whole blocks.
        values = tl.where(values == values, tl.clamp(values, -FP8_MAX, FP8_MAX), 0.0)
    return values.to(DTYPE)


@triton.jit
def score_new_token(
    query,  # [BLOCK_G, BLOCK_D]
    key,  # [1, BLOCK_D], as stored
    score_scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
):
    """The new key's scores for exp2, [BLOCK_G]."""
    scores = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * score_scale
    if HAS_SOFT_CAP:
        scores = cap_scores(scores, soft_cap) * LOG2_E
    return scores


@triton.jit
def add_new_token(
    highest,  # [BLOCK_G]
    total,  # [BLOCK_G]
    acc,  # [BLOCK_G, BLOCK_D]
    scores,  # [BLOCK_G]; -inf adds nothing
    value,  # [1, BLOCK_D], as stored
):
    """The softmax state with one more key."""
    highest_now = tl.maximum(highest, scores)
    old = tl.exp2(highest - highest_now)
    weight = tl.exp2(scores - highest_now)
    return (
        highest_now,
        total * old + weight,
        acc * old[:, None] + weight[:, None] * value.to(tl.float32),
    )
