"""The kernel behind `streamed_gemm`: weights go from memory to the integer tensor cores untouched.

A program computes tiles of 16 or 32 weight rows. Its warps share K: in a step, each multiplies one
block of 128 bytes of every row, which a thread loads 16 bytes at a time in the order the tensor
cores want them. The loads of the next STAGES steps, of the next tile as well, are always under way.

Before the first step a program splits x into bytes: per block of K, x = (d_0 2^16 + d_1 2^8 + d_2)
2^s with signed bytes d_p, exact to 2^-21 of the block's largest value (two bytes and 2^-14 with
more than two rows). The bytes of a row of x are columns of the right operand, so that 1-2 rows in
three bytes, or 4 in two, cost as much as one in one. Products with int8 weights are exact; each
block's sum is scaled in float32.

int4 weights are masked to the high halves of bytes, q * 16 as signed bytes. Neighbouring bytes
hold nibbles of planes 0 and 1, and of 2 and 3 (`int4_packing`): for a plane the other bytes are 0.

Does not know which tile suits which shape.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

BLOCK_BYTES = gl.constexpr(128)
"""Of a row, multiplied by one warp in one step."""


@gluon.jit
def _block_rows(tile, r, i, N, R: gl.constexpr, SWIGLU: gl.constexpr, EVEN_N: gl.constexpr):
    """(first, rest): rows first + rest of the weight are rows `i` (0-15) of block `r` of a tile;
    `first` is the same for all threads. Gate rows come first in a tile, then theirs of up.
    """
    if SWIGLU and R == 1:
        first = tile * 8
        rest = i % 8
        if not EVEN_N:
            rest = gl.minimum(rest, N - 1 - first)
        return first, rest + (i // 8) * N
    elif SWIGLU:
        HALF: gl.constexpr = R // 2
        first = tile * (16 * HALF) + (r % HALF) * 16
        rest = i
        if not EVEN_N:
            rest = gl.minimum(i, N - 1 - first)
        return first + (r // HALF) * N, rest
    else:
        first = tile * (16 * R) + r * 16
        rest = i
        if not EVEN_N:
            rest = gl.minimum(i, N - 1 - first)
        return first, rest


@gluon.jit
def _load_scale(ptrs, mask):
    """Bits of scales; 16-bit ones as integers, which a loop carries without repacking."""
    bits = gl.load(ptrs, mask=mask)
    if bits.dtype == gl.float32:
        return bits
    else:
        return bits.to(gl.uint16, bitcast=True).to(gl.uint32)


@gluon.jit
def _scale_value(bits, DTYPE: gl.constexpr):
    """float32 of `_load_scale`'s bits."""
    if gl.float32 == DTYPE:
        return bits
    elif gl.bfloat16 == DTYPE:
        return (bits << 16).to(gl.float32, bitcast=True)
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }",
            "=f,r",
            [bits],
            dtype=gl.float32,
            is_pure=True,
            pack=1,
        )


@gluon.jit
def _load_step(
    weight_ptr, scale_ptr, stride_wn, stride_sn, stride_sg,
    tile, step, is_there, N, num_words, num_groups,
    WORDS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, R: gl.constexpr,
    GROUPS: gl.constexpr, EVEN_K: gl.constexpr, EVEN_N: gl.constexpr, SWIGLU: gl.constexpr,
):  # fmt: skip
    """(words, scales) of one step: R times [WARPS, 16, 32] int32 in layout WORDS, and for int4 R
    times GROUPS times [WARPS, 16] in the layout of a product's rows.
    """
    s = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None][:, :, None]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :][:, :, None]
    j = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, :][:, None, :]
    word_0 = step * (WARPS * 32)
    word = s * 32 + j
    mask = is_there
    if not EVEN_K:
        # Past the end of a row x is 0, whatever the register of a load that is left out holds.
        mask = is_there & (word_0 + word < num_words)
    words: gl.tuple = ()
    scales: gl.tuple = ()
    for r in gl.static_range(R):
        first, rest = _block_rows(tile, r, i, N, R, SWIGLU, EVEN_N)
        base = weight_ptr + (first.to(gl.int64) * stride_wn + word_0)
        offsets = rest * gl.to_tensor(stride_wn).to(gl.int32) + word
        words += (gl.load(base + offsets, mask=mask, eviction_policy="evict_first"),)
    if GROUPS > 0:
        s_2 = gl.arange(0, WARPS, gl.SliceLayout(1, PARTS))[:, None]
        i_2 = gl.arange(0, 16, gl.SliceLayout(0, PARTS))[None, :]
        for r in gl.static_range(R):
            first, rest = _block_rows(tile, r, i_2, N, R, SWIGLU, EVEN_N)
            base = scale_ptr + first.to(gl.int64) * stride_sn
            row_offsets = rest * gl.to_tensor(stride_sn).to(gl.int32)
            for g in gl.static_range(GROUPS):
                group = (step * WARPS + s_2) * GROUPS + g
                if not EVEN_K:
                    group = gl.minimum(group, num_groups - 1)
                offsets = row_offsets + group * gl.to_tensor(stride_sg).to(gl.int32)
                scales += (_load_scale(base + offsets, is_there),)
    return words, scales


@gluon.jit
def _as_bytes(words, BYTES: gl.constexpr):
    """int8 [WARPS, 16, 128] in layout BYTES of int32 [WARPS, 16, 32]; no instruction."""
    b_0 = words.to(gl.int8)
    b_1 = (words >> 8).to(gl.int8)
    b_2 = (words >> 16).to(gl.int8)
    b_3 = (words >> 24).to(gl.int8)
    halves = gl.join(gl.join(b_0, b_2), gl.join(b_1, b_3))
    shape: gl.constexpr = [words.shape[0], words.shape[1], words.shape[2] * 4]
    return gl.convert_layout(gl.reshape(halves, shape), BYTES, assert_trivial=True)


@triton.constexpr_function
def _plane_asm(plane):
    """Nibble `plane` of each half of a register as the signed byte 16 * (u - 8) at its place."""
    mask, sign = ("0x00F000F0", "0x00800080") if plane < 2 else ("0xF000F000", "0x80008000")
    shift = "shl.b32 t, $1, 4;" if plane % 2 == 0 else "mov.b32 t, $1;"
    # 0x6A: (a & b) ^ c.
    return f"{{ .reg .b32 t, c; mov.b32 c, {sign}; {shift} lop3.b32 $0, t, {mask}, c, 0x6A; }}"


@gluon.jit
def _plane(words, PLANE: gl.constexpr, BYTES: gl.constexpr):
    """Weights of one plane times 16, and zeros between, int8 [WARPS, 16, 128]."""
    bits = gl.inline_asm_elementwise(
        _plane_asm(PLANE), "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1
    )
    return _as_bytes(bits, BYTES)


@gluon.jit
def _column_of_byte(byte, HALF: gl.constexpr, PLANE: gl.constexpr):
    """Column, within the block, of the weight in a byte; of its low or high half for int4."""
    if PLANE == 0:
        return byte
    else:
        word = byte // 2
        plane = (byte % 2) * 2 + HALF
        return word // PLANE * (4 * PLANE) + plane * PLANE + word % PLANE


@gluon.jit
def _load_x(
    x_ptr, stride_xm, M, K, step,
    SPLIT: gl.constexpr, WARPS: gl.constexpr, ROWS: gl.constexpr, HALVES: gl.constexpr,
    PLANE: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """x [WARPS, 128, ROWS] of a step, in the order of the weights' bytes; for int4 of the low and
    of the high halves.
    """
    s = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, SPLIT)))[:, None][:, :, None]
    b = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, SPLIT)))[None, :][:, :, None]
    m = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, SPLIT)))[None, :][:, None, :]
    row_ptrs = x_ptr + gl.minimum(m, M - 1).to(gl.int64) * stride_xm
    xs: gl.tuple = ()
    for half in gl.static_range(HALVES):
        k = (step * WARPS + s) * (128 * HALVES) + _column_of_byte(b, half, PLANE)
        if EVEN_K:
            xs += (gl.load(row_ptrs + k),)
        else:
            xs += (gl.load(row_ptrs + k, mask=k < K, other=0.0),)
    return xs


@gluon.jit
def _low_byte(x):
    """(the low byte as a signed one, what is left for those above)"""
    low = x.to(gl.int8)
    return low, (x - low.to(gl.int32)) >> 8


@gluon.jit
def _split_x(
    xs, digits, factors,
    WARPS: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Write a step's bytes of x to `digits` and what they count to `factors`; squares of x."""
    BITS: gl.constexpr = 21 if SLOTS == 4 else 13
    largest = xs[0].to(gl.float32).to(gl.int32, bitcast=True) & 0x7FFFFFFF
    squares = xs[0].to(gl.float32) * xs[0].to(gl.float32)
    if HALVES == 2:
        # Magnitudes in the order of their bits; NaN above all.
        other = xs[1].to(gl.float32)
        largest = gl.maximum(largest, other.to(gl.int32, bitcast=True) & 0x7FFFFFFF)
        squares += other * other
    exponent = gl.max(largest, axis=1) >> 23  # [WARPS, ROWS], with its bias
    is_finite = exponent < 255
    # Blocks below 2^-95 count as if they reached it: every factor is a normal number.
    exponent = gl.maximum(exponent, 32)
    up = gl.expand_dims(((254 + BITS - exponent) << 23).to(gl.float32, bitcast=True), 1)
    # Nibbles stand at the upper half of a byte: 16 times as large.
    lowest = ((exponent - BITS - (4 if HALVES == 2 else 0)) << 23).to(gl.float32, bitcast=True)
    lowest = gl.where(is_finite, lowest, float("nan"))
    if SLOTS == 4:
        # The fourth column is multiplied as well, with a zero.
        factor = gl.join(gl.join(lowest, lowest * 65536.0), gl.join(lowest * 256.0, lowest))
    else:
        factor = gl.join(lowest, lowest * 256.0)
    factors.slice(0, ROWS, dim=1).store(gl.reshape(factor, [WARPS, ROWS, SLOTS]))
    for half in gl.static_range(HALVES):
        # Adding 1.5 * 2^23 leaves the rounded number in the low bits.
        shifted = xs[half].to(gl.float32) * up + 12582912.0
        d_0, rest = _low_byte(shifted.to(gl.int32, bitcast=True) - 0x4B400000)
        d_1, rest = _low_byte(rest)
        if SLOTS == 4:
            d_2, rest = _low_byte(rest)
            digit = gl.join(gl.join(d_0, d_2), gl.join(d_1, gl.zeros_like(d_2)))
        else:
            digit = gl.join(d_0, d_1)
        target = digits.slice(half * WARPS, WARPS, dim=0)
        target.slice(0, ROWS, dim=2).store(gl.reshape(digit, [WARPS, 128, ROWS, SLOTS]))
    return squares


@gluon.jit
def _add_step(
    acc, words, scales, digits, factors,
    PRODUCT: gl.constexpr, BYTES: gl.constexpr, X_BYTES: gl.constexpr, PARTS: gl.constexpr,
    WARPS: gl.constexpr, R: gl.constexpr, IS_INT4: gl.constexpr, GROUPS: gl.constexpr,
    SCALE_DTYPE: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """acc plus the products of a step, R times [WARPS, 16, COLUMNS] float32."""
    factor = gl.expand_dims(factors.load(gl.SliceLayout(1, PRODUCT)), 1)
    zeros = gl.zeros([WARPS, 16, COLUMNS], gl.int32, PRODUCT)
    added: gl.tuple = ()
    if IS_INT4:
        x_low = digits.slice(0, WARPS, dim=0).load(X_BYTES)
        x_high = digits.slice(WARPS, WARPS, dim=0).load(X_BYTES)
        for r in gl.static_range(R):
            scaled = gl.zeros([WARPS, 16, COLUMNS], gl.float32, PRODUCT)
            for plane in gl.static_range(4):
                x = x_low if plane % 2 == 0 else x_high
                if plane % (4 // GROUPS) == 0:
                    product = zeros
                product = mma_v2(_plane(words[r], plane, BYTES), x, product)
                if (plane + 1) % (4 // GROUPS) == 0:
                    bits = scales[r * GROUPS + plane * GROUPS // 4]
                    scale = gl.expand_dims(_scale_value(bits, SCALE_DTYPE), 2)
                    scaled += product.to(gl.float32) * scale
            added += (acc[r] + scaled * factor,)
    else:
        x = digits.load(X_BYTES)
        for r in gl.static_range(R):
            product = mma_v2(_as_bytes(words[r], BYTES), x, zeros)
            added += (acc[r] + product.to(gl.float32) * factor,)
    return added


@gluon.jit
def _scale_columns(y, n, in_range, column_scale_ptr, bias_ptr):
    if column_scale_ptr is not None:
        scale = gl.load(column_scale_ptr + n, mask=in_range, other=0.0)
        y *= scale.to(gl.float32)[:, None]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + n, mask=in_range, other=0.0)
        y += bias.to(gl.float32)[:, None]
    return y


@gluon.jit
def _sum_of_warps(sums, first, SUMS: gl.constexpr, ROWS: gl.constexpr):
    """[ROWS, rows of x]: what warps and digits add up to for ROWS rows of a tile."""
    parts = sums.slice(first, ROWS, dim=1).load(SUMS)  # [WARPS, ROWS, rows of x, SLOTS]
    return gl.sum(gl.sum(parts, axis=3), axis=0)


@gluon.jit
def _store_tile(
    sums, rstd, tile, column_scale_ptr, bias_ptr, residual_ptr, out_ptr,
    stride_rm, stride_om, M, N,
    SUMS: gl.constexpr, OUT_ROWS: gl.constexpr, SWIGLU: gl.constexpr,
):  # fmt: skip
    """y [OUT_ROWS, rows of x] of one tile; see `gemm_epilogue`."""
    OUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, SUMS))
    n = tile * OUT_ROWS + gl.arange(0, OUT_ROWS, gl.SliceLayout(1, OUT))
    m = gl.arange(0, sums.shape[2], gl.SliceLayout(0, OUT))
    n_in_range = n < N
    in_range = n_in_range[:, None] & (m < M)[None, :]
    m_64 = m.to(gl.int64)[None, :]
    y = _sum_of_warps(sums, 0, SUMS, OUT_ROWS) * rstd[None, :]
    y = _scale_columns(y, n, n_in_range, column_scale_ptr, bias_ptr)
    if SWIGLU:
        up = _sum_of_warps(sums, OUT_ROWS, SUMS, OUT_ROWS) * rstd[None, :]
        up = _scale_columns(up, N + n, n_in_range, column_scale_ptr, bias_ptr)
        y = y / (1.0 + gl.exp(-y)) * up
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + m_64 * stride_rm + n[:, None]
        y += gl.load(residual_ptrs, mask=in_range, other=0.0).to(gl.float32)
    out_ptrs = out_ptr + m_64 * stride_om + n[:, None]
    gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=in_range)


@gluon.jit
def _next(step, tile, num_programs, STEPS: gl.constexpr):
    """(step, tile) after these."""
    step += 1
    is_done = step == STEPS
    return gl.where(is_done, 0, step), gl.where(is_done, tile + num_programs, tile)


@gluon.jit
def streamed_gemm_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K / 4 or K / 8] int32, with SWIGLU [2 N, ..]: gate rows, then up rows
    scale_ptr,  # [N or 2 N], int4 [N or 2 N, num_groups]
    bias_ptr,  # [N or 2 N], or None
    residual_ptr,  # [M, N], or None
    out_ptr,  # [M, N]
    stride_xm: gl.int64,
    stride_wn: gl.int64,
    stride_sn: gl.int64,
    stride_sg: gl.int64,
    stride_rm: gl.int64,
    stride_om: gl.int64,
    M,
    N,
    K,
    num_tiles,
    num_words,
    num_groups,
    rms_eps,
    ROWS: gl.constexpr,  # of x that are split: M, or the power of two above it
    COLUMNS: gl.constexpr,  # of the right operand: 8 or 16
    SLOTS: gl.constexpr,  # columns of a row of x
    WARPS: gl.constexpr,
    R: gl.constexpr,  # blocks of 16 weight rows in a tile
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    PLANE: gl.constexpr,  # of int4 words; 0 for int8
    GROUPS: gl.constexpr,  # of int4 in a block: 2 or 4
    HAS_RMS: gl.constexpr,
    SWIGLU: gl.constexpr,
    EVEN_K: gl.constexpr,
    EVEN_N: gl.constexpr,
):
    IS_INT4: gl.constexpr = PLANE > 0
    HALVES: gl.constexpr = 2 if IS_INT4 else 1
    MAX_M: gl.constexpr = COLUMNS // SLOTS
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    BYTES: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 16)
    WORDS: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    X_BYTES: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 16)
    PARTS: gl.constexpr = gl.SliceLayout(2, PRODUCT)
    SPLIT: gl.constexpr = gl.BlockedLayout([1, 4, 1], [1, 32, 1], [WARPS, 1, 1], [1, 0, 2])
    SUMS: gl.constexpr = gl.BlockedLayout(
        [WARPS * MAX_M // 16, 1, 1, SLOTS],
        [16 // MAX_M, 2, MAX_M, 1],
        [1, WARPS, 1, 1],
        [3, 2, 1, 0],
    )
    X_ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(3, SUMS)))
    SCALE_DTYPE: gl.constexpr = scale_ptr.dtype.element_ty
    OUT_ROWS: gl.constexpr = 8 * R if SWIGLU else 16 * R
    digits = gl.allocate_shared_memory(
        gl.int8,
        [STEPS, HALVES * WARPS, 128, COLUMNS],
        gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0]),
    )
    factors = gl.allocate_shared_memory(
        gl.float32, [STEPS, WARPS, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    sums = gl.allocate_shared_memory(
        gl.float32, [WARPS, 16 * R, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    num_items = (num_tiles - program + num_programs - 1) // num_programs * STEPS
    words: gl.tuple = ()
    scales: gl.tuple = ()
    load_step = 0
    load_tile = program
    for stage in gl.static_range(STAGES):
        step_words, step_scales = _load_step(
            weight_ptr, scale_ptr, stride_wn, stride_sn, stride_sg,
            load_tile, load_step, stage < num_items, N, num_words, num_groups,
            WORDS, PARTS, WARPS, R, GROUPS, EVEN_K, EVEN_N, SWIGLU,
        )  # fmt: skip
        words += (step_words,)
        scales += (step_scales,)
        load_step, load_tile = _next(load_step, load_tile, num_programs, STEPS)
    xs: gl.tuple = ()
    for split_step in gl.static_range(STEPS):
        xs += (
            _load_x(x_ptr, stride_xm, M, K, split_step, SPLIT, WARPS, ROWS, HALVES, PLANE, EVEN_K),
        )
    squares = gl.zeros([WARPS, 128, ROWS], gl.float32, SPLIT)
    for split_step in gl.static_range(STEPS):
        squares += _split_x(
            xs[split_step],
            digits.index(split_step).reshape([HALVES * WARPS, 128, MAX_M, SLOTS]),
            factors.index(split_step).reshape([WARPS, MAX_M, SLOTS]),
            WARPS, ROWS, SLOTS, HALVES,
        )  # fmt: skip
    gl.thread_barrier()
    rstd = gl.full([MAX_M], 1.0, gl.float32, X_ROWS)
    if HAS_RMS:
        sum_sq = gl.sum(gl.sum(squares, axis=1), axis=0)
        of_rows = gl.rsqrt(sum_sq / K + rms_eps)
        rstd = gl.sum(of_rows, axis=0) * rstd if ROWS == 1 else gl.convert_layout(of_rows, X_ROWS)
    acc: gl.tuple = ()
    for _ in gl.static_range(R):
        acc += (gl.zeros([WARPS, 16, COLUMNS], gl.float32, PRODUCT),)
    step = 0
    tile = program
    for item_0 in range(0, num_items, STAGES):
        for stage in gl.static_range(STAGES):
            if item_0 + stage < num_items:
                acc = _add_step(
                    acc, words[stage], scales[stage], digits.index(step), factors.index(step),
                    PRODUCT, BYTES, X_BYTES, PARTS, WARPS, R, IS_INT4, GROUPS, SCALE_DTYPE, COLUMNS,
                )  # fmt: skip
                if step == STEPS - 1:
                    for r in gl.static_range(R):
                        sums.slice(16 * r, 16, dim=1).store(acc[r])
                    _store_tile(
                        sums.reshape([WARPS, 16 * R, MAX_M, SLOTS]), rstd, tile,
                        None if IS_INT4 else scale_ptr, bias_ptr, residual_ptr, out_ptr,
                        stride_rm, stride_om, M, N, SUMS, OUT_ROWS, SWIGLU,
                    )  # fmt: skip
                    cleared: gl.tuple = ()
                    for _ in gl.static_range(R):
                        cleared += (gl.zeros([WARPS, 16, COLUMNS], gl.float32, PRODUCT),)
                    acc = cleared
                step, tile = _next(step, tile, num_programs, STEPS)
            step_words, step_scales = _load_step(
                weight_ptr, scale_ptr, stride_wn, stride_sn, stride_sg,
                load_tile, load_step, item_0 + stage + STAGES < num_items,
                N, num_words, num_groups,
                WORDS, PARTS, WARPS, R, GROUPS, EVEN_K, EVEN_N, SWIGLU,
            )  # fmt: skip
            words = words[:stage] + (step_words,) + words[stage + 1 :]  # noqa: RUF005
            scales = scales[:stage] + (step_scales,) + scales[stage + 1 :]  # noqa: RUF005
            load_step, load_tile = _next(load_step, load_tile, num_programs, STEPS)
