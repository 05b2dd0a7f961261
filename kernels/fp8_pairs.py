"""e4m3 values read two at a time, and widened after they are laid out for the tensor cores.

Tensor-core operands are loaded from shared memory by instructions for 16-bit values. Keys and
values of 8 bits, taken as int16 pairs of neighbouring dimensions, go the same way as 16-bit ones;
each pair is then parted into its even and its odd dimension, as float16, in registers. A thread
holds two pairs in one 32-bit register: one byte permutation and two conversions for four values,
and nothing goes through shared memory twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

_WIDEN = """{{
    .reg .b32 sorted;
    .reg .b16 even, odd;
    prmt.b32 sorted, $1, $1, 0x3120;
    mov.b32 {{even, odd}}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, {half};
    }}"""
_WIDEN_EVEN = tl.constexpr(_WIDEN.format(half="even"))
_WIDEN_ODD = tl.constexpr(_WIDEN.format(half="odd"))


@triton.jit
def even_values(pairs, INTERPRETED: tl.constexpr):
    """The first value of each pair (its low byte): float16, shaped like `pairs`."""
    if INTERPRETED:
        return (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _WIDEN_EVEN, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def odd_values(pairs, INTERPRETED: tl.constexpr):
    """The second value of each pair (its high byte): float16, shaped like `pairs`."""
    if INTERPRETED:
        return ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _WIDEN_ODD, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2
        )
