"""Steps that decode and prefill attention share on the device."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cap_scores(scores, soft_cap):
    """soft_cap * tanh(scores / soft_cap); exact at both ends, where exp overflows or vanishes."""
    return soft_cap - 2.0 * soft_cap / (tl.exp(scores * (2.0 / soft_cap)) + 1.0)


@triton.jit
def as_operand(query, DTYPE: tl.constexpr, STORED_DTYPE: tl.constexpr):
    """Queries of STORED_DTYPE in the dtype of the products."""
    if STORED_DTYPE != DTYPE:
        # bfloat16 queries beside 8-bit keys: their range is wider than what is computed in.
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0)
    return query.to(DTYPE)


@triton.jit
def score_scale_of(scale, k_scale_ptr, kv_head, HAS_SOFT_CAP: tl.constexpr):
    """Factor of a head's scores: for exp2, unless a soft cap comes in between."""
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + kv_head)
    if not HAS_SOFT_CAP:
        scale *= LOG2_E
    return scale


@triton.jit
def finite_anchor(highest, MAY_BE_EMPTY: tl.constexpr):
    """What exponents are taken relative to: finite, also for a row that has seen no key yet."""
    if MAY_BE_EMPTY:
        return tl.where(highest == float("-inf"), 0.0, highest)
    return highest


@triton.jit
def widen(x, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Keys or values as operands of a product.

    8-bit values are widened where they were loaded, two an instruction, and only then laid out
    for the tensor cores: those can transpose 16-bit values on the way, 8-bit ones only by bytes.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            # Pure code would be moved behind the change of layout.
            is_pure=False,
            pack=4,
        )
    return x.to(DTYPE)
