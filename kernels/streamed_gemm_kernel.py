"""The kernel behind `streamed_gemm`: a tile of weights on its way before x is there.

A program computes 16 or 32 weight rows. Its warps share K: in a step, each multiplies one block of
128 bytes of every row. The loads of the first STAGES steps are issued before the wait for the
kernel before; x is read straight into the layout of the tensor cores' right operand, eight columns
of it, where the rows of x are, and copies of the last one.

Weights become bfloat16, exactly, in registers: a nibble u under the exponent of 128 reads 128 + u,
the low seven bits of a byte likewise, and a constant, or the byte's sign, is subtracted. Within a
block k is taken in the order in which one 16-byte load leaves neighbouring registers of x
together, which the tensor cores want in pairs.

Does not know which tile suits which shape.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PLANE = gl.constexpr(64)
"""int4 words of a row that a warp multiplies in one step: a chunk of `int4_packing`."""
COLUMNS = gl.constexpr(8)
"""Of the tensor cores' right operand: the rows of x."""


@triton.constexpr_function
def _nibble_asm(plane):
    """Nibble `plane` of two words to a pair of bfloat16: 128 + (q + 8), less 136."""
    shift = f"shr.b32 t, $1, {4 * plane};" if plane else "mov.b32 t, $1;"
    return (
        "{ .reg .b32 t, c; mov.b32 c, 0x43084308;"
        f" {shift} lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; sub.rn.bf16x2 $0, t, c; }}"
    )


@triton.constexpr_function
def _byte_asm():
    """Four signed bytes to two pairs of bfloat16: 128 + (q & 127), less 128, or 256 below zero."""
    pairs = [
        f"prmt.b32 t, $2, 0, {selector}; lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA;"
        f" lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA; sub.rn.bf16x2 ${i}, a, b;"
        for i, selector in enumerate(("0x4140", "0x4342"))
    ]
    return "{ .reg .b32 t, a, b; " + " ".join(pairs) + " }"


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
def _pair_x(x, LAYOUT: gl.constexpr):
    """x [WARPS, k, COLUMNS] with k in the order of `_pair_weights`; no instruction."""
    W: gl.constexpr = x.shape[0]
    K: gl.constexpr = x.shape[1]
    C: gl.constexpr = x.shape[2]
    # k = half, thread, (pair of registers, register), element; the register goes first.
    x = gl.permute(gl.reshape(x, [W, 2, 4, K // 32, 2, 2, C]), [0, 4, 2, 1, 3, 5, 6])
    return gl.convert_layout(gl.reshape(x, [W, K, C]), LAYOUT)


@gluon.jit
def _pair_weights(weight, LAYOUT: gl.constexpr):
    """Weights [WARPS, 16, k] with k in the order of `_pair_x`."""
    W: gl.constexpr = weight.shape[0]
    N: gl.constexpr = weight.shape[1]
    K: gl.constexpr = weight.shape[2]
    weight = gl.permute(gl.reshape(weight, [W, N, 2, 4, K // 32, 2, 2]), [0, 1, 5, 3, 2, 4, 6])
    return gl.convert_layout(gl.reshape(weight, [W, N, K]), LAYOUT)


@gluon.jit
def _load_x(x_ptrs, k_of, K, K_0: gl.constexpr, LAYOUT: gl.constexpr, EVEN_K: gl.constexpr):
    if EVEN_K:
        return _pair_x(gl.load(x_ptrs + K_0), LAYOUT)
    else:
        return _pair_x(gl.load(x_ptrs + K_0, mask=k_of + K_0 < K, other=0.0), LAYOUT)


@gluon.jit
def _load_step(
    weight_ptrs, scale_ptrs, word_of, warp, num_words, num_groups,
    STEP: gl.constexpr, WARPS: gl.constexpr, PIECE: gl.constexpr, R: gl.constexpr,
    GROUPS: gl.constexpr, STRIDE_SG: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """(words, scales) of one step: R times [WARPS, 16, PIECE], and for int4 R times GROUPS times
    [WARPS, 16]. Offsets are constants, which the load instructions hold.
    """
    FIRST: gl.constexpr = STEP * WARPS * PIECE
    words: gl.tuple = ()
    scales: gl.tuple = ()
    for r in gl.static_range(R):
        if EVEN_K:
            words += (gl.load(weight_ptrs[r] + FIRST, eviction_policy="evict_first"),)
        else:
            mask = word_of + FIRST < num_words
            words += (
                gl.load(weight_ptrs[r] + FIRST, mask=mask, other=0, eviction_policy="evict_first"),
            )
    for r in gl.static_range(R):
        for g in gl.static_range(GROUPS):
            if EVEN_K:
                scales += (gl.load(scale_ptrs[r] + (STEP * WARPS * GROUPS + g) * STRIDE_SG),)
            else:
                # A group past the end of K meets zeros of x; its scale is that of the last one.
                group = gl.minimum((STEP * WARPS + warp) * GROUPS + g, num_groups - 1)
                scales += (gl.load(scale_ptrs[r] + group * STRIDE_SG),)
    return words, scales


@gluon.jit
def _add_step(
    acc, words, scales, x_ptrs, k_of, K,
    K_0: gl.constexpr, PRODUCT: gl.constexpr, A: gl.constexpr, X: gl.constexpr,
    WARPS: gl.constexpr, R: gl.constexpr, GROUPS: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """acc plus the products of a step, R times [WARPS, 16, COLUMNS] float32."""
    added: gl.tuple = ()
    if GROUPS > 0:
        PLANES_OF_GROUP: gl.constexpr = 4 // GROUPS
        xs: gl.tuple = ()
        for plane in gl.static_range(4):
            xs += (_load_x(x_ptrs, k_of, K, K_0 + plane * PLANE, X, EVEN_K),)
        for r in gl.static_range(R):
            total = acc[r]
            for plane in gl.static_range(4):
                if plane % PLANES_OF_GROUP == 0:
                    product = gl.zeros([WARPS, 16, COLUMNS], gl.float32, PRODUCT)
                weight = gl.inline_asm_elementwise(
                    _nibble_asm(plane), "=r,r", [words[r]],
                    dtype=gl.bfloat16, is_pure=True, pack=2,
                )  # fmt: skip
                product = mma_v2(_pair_weights(weight, A), xs[plane], product)
                if (plane + 1) % PLANES_OF_GROUP == 0:
                    scale = scales[r * GROUPS + plane // PLANES_OF_GROUP].to(gl.float32)
                    total += product * gl.expand_dims(scale, 2)
            added += (total,)
    else:
        x = _load_x(x_ptrs, k_of, K, K_0, X, EVEN_K)
        for r in gl.static_range(R):
            weight = gl.inline_asm_elementwise(
                _byte_asm(), "=r,=r,r", [words[r]], dtype=gl.bfloat16, is_pure=True, pack=4
            )
            added += (mma_v2(_pair_weights(weight, A), x, acc[r]),)
    return added


@gluon.jit
def _squares_of_x(
    x_ptr, stride_xm, M, K,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH / 8] sums of x^2 that no other thread has a part of."""
    m = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None][:, :, None]
    i = gl.arange(0, WIDTH // 8, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :][:, :, None]
    j = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :][:, None, :]
    k = i * 8 + j
    rows = gl.minimum(m, M - 1) * gl.to_tensor(stride_xm).to(gl.int32)
    x = gl.load(x_ptr + rows + k, mask=k < K, other=0.0).to(gl.float32)
    return gl.sum(x * x, axis=2)


@gluon.jit
def _rstd_of_columns(
    squares, K, rms_eps,
    ROWS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[COLUMNS]: 1 / sqrt(mean(x^2) + rms_eps) of the rows of x."""
    rstd = gl.rsqrt(gl.sum(squares, axis=1) / K + rms_eps)
    if ROWS == 1:
        return gl.sum(rstd, axis=0) * gl.full([COLUMNS], 1.0, gl.float32, LAYOUT)
    else:
        PAIRS: gl.constexpr = gl.BlockedLayout([1, 1], [4, COLUMNS], [WARPS, 1], [1, 0])
        row = gl.arange(0, ROWS, gl.SliceLayout(1, PAIRS))[:, None]
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, PAIRS))[None, :]
        rstd = gl.convert_layout(rstd, gl.SliceLayout(1, PAIRS))[:, None]
        return gl.convert_layout(gl.sum(gl.where(row == column, rstd, 0.0), axis=0), LAYOUT)


@gluon.jit
def _sum_of_warps(sums, first, SUMS: gl.constexpr, ROWS: gl.constexpr):
    """[ROWS, COLUMNS]: what the warps' parts of rows from `first` on add up to."""
    return gl.sum(sums.slice(first, ROWS, dim=1).load(SUMS), axis=0)


@gluon.jit
def _load_columns(ptr, n, in_range):
    """[rows of the tile, 1] float32."""
    return gl.load(ptr + n, mask=in_range, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def _replaced(values, value, INDEX: gl.constexpr):
    """`values` with `value` as the one at INDEX."""
    return values[:INDEX] + (value,) + values[INDEX + 1 :]  # noqa: RUF005


@gluon.jit
def streamed_gemm_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # int8 [N, K] or int16 [N, K / 4], with SWIGLU [2 N, ..]: gate rows, then up rows
    scale_ptr,  # [N or 2 N], int4 [N or 2 N, num_groups]
    bias_ptr,  # [N or 2 N], or None
    residual_ptr,  # [M, N], or None
    out_ptr,  # [M, N]
    stride_xm: gl.int64,
    stride_wn: gl.int64,
    stride_sn: gl.int64,
    stride_rm: gl.int64,
    stride_om: gl.int64,
    M,
    N,
    K,
    num_words,
    num_groups,
    rms_eps,
    ROWS: gl.constexpr,  # M, or the power of two above it
    WARPS: gl.constexpr,
    R: gl.constexpr,  # blocks of 16 weight rows in a tile
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,  # of int4 in a block: 2 or 4; 0 for int8
    STRIDE_SG: gl.constexpr,
    RMS_WIDTH: gl.constexpr,  # K, or the power of two above it; 0 without RMSNorm
    SWIGLU: gl.constexpr,
    EVEN_K: gl.constexpr,
    EVEN_N: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    IS_INT4: gl.constexpr = GROUPS > 0
    PIECE: gl.constexpr = PLANE if IS_INT4 else 128
    BLOCK: gl.constexpr = 4 * PLANE if IS_INT4 else 128
    OUT_ROWS: gl.constexpr = 8 * R if SWIGLU else 16 * R
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 8 if IS_INT4 else 16)
    X: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 8 if IS_INT4 else 16)
    SCALES: gl.constexpr = gl.SliceLayout(2, PRODUCT)
    SUMS: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 4, COLUMNS], [1, WARPS, 1], [2, 1, 0])
    SQUARES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, SUMS)
    tile = gl.program_id(0)
    if USE_PDL:
        gdc_launch_dependents()
    s = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None][:, :, None]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :][:, :, None]
    j = gl.arange(0, PIECE, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, :][:, None, :]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, SCALES))[:, None]
    row = gl.arange(0, 16, gl.SliceLayout(0, SCALES))[None, :]
    word_of = s * PIECE + j
    weight_ptrs: gl.tuple = ()
    scale_ptrs: gl.tuple = ()
    for r in gl.static_range(R):
        first, rest = _block_rows(tile, r, i, N, R, SWIGLU, EVEN_N)
        ptrs = weight_ptr + first.to(gl.int64) * stride_wn
        weight_ptrs += (ptrs + rest * gl.to_tensor(stride_wn).to(gl.int32) + word_of,)
        if IS_INT4:
            first, rest = _block_rows(tile, r, row, N, R, SWIGLU, EVEN_N)
            ptrs = scale_ptr + first.to(gl.int64) * stride_sn
            ptrs += rest * gl.to_tensor(stride_sn).to(gl.int32)
            scale_ptrs += (ptrs + warp * (GROUPS * STRIDE_SG) if EVEN_K else ptrs,)
    words: gl.tuple = ()
    scales: gl.tuple = ()
    for step in gl.static_range(STAGES):
        step_words, step_scales = _load_step(
            weight_ptrs, scale_ptrs, word_of, warp, num_words, num_groups,
            step, WARPS, PIECE, R, GROUPS, STRIDE_SG, EVEN_K,
        )  # fmt: skip
        words += (step_words,)
        scales += (step_scales,)
    n = tile * OUT_ROWS + gl.arange(0, OUT_ROWS, gl.SliceLayout(1, OUT))
    n_in_range = n < N
    if not IS_INT4:
        gain = _load_columns(scale_ptr, n, n_in_range)
        if SWIGLU:
            up_gain = _load_columns(scale_ptr, N + n, n_in_range)
    m_x = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, :][:, None, :]
    s_x = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None][:, :, None]
    j_x = gl.arange(0, PIECE, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :][:, :, None]
    k_of = s_x * BLOCK + j_x
    x_ptrs = x_ptr + gl.minimum(m_x, M - 1) * gl.to_tensor(stride_xm).to(gl.int32) + k_of
    if USE_PDL:
        gdc_wait()
    if RMS_WIDTH > 0:
        squares = _squares_of_x(x_ptr, stride_xm, M, K, ROWS, RMS_WIDTH, SQUARES)
    m = gl.arange(0, COLUMNS, gl.SliceLayout(0, OUT))
    m_64 = m.to(gl.int64)[None, :]
    in_range = n_in_range[:, None] & (m < M)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + m_64 * stride_rm + n[:, None]
        residual = gl.load(residual_ptrs, mask=in_range, other=0.0).to(gl.float32)
    acc: gl.tuple = ()
    for _ in gl.static_range(R):
        acc += (gl.zeros([WARPS, 16, COLUMNS], gl.float32, PRODUCT),)
    for step in gl.static_range(STEPS):
        acc = _add_step(
            acc, words[step % STAGES], scales[step % STAGES], x_ptrs, k_of, K,
            step * WARPS * BLOCK, PRODUCT, A, X, WARPS, R, GROUPS, EVEN_K,
        )  # fmt: skip
        if step + STAGES < STEPS:
            step_words, step_scales = _load_step(
                weight_ptrs, scale_ptrs, word_of, warp, num_words, num_groups,
                step + STAGES, WARPS, PIECE, R, GROUPS, STRIDE_SG, EVEN_K,
            )  # fmt: skip
            words = _replaced(words, step_words, step % STAGES)
            scales = _replaced(scales, step_scales, step % STAGES)
    sums = gl.allocate_shared_memory(
        gl.float32, [WARPS, 16 * R, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    for r in gl.static_range(R):
        sums.slice(16 * r, 16, dim=1).store(acc[r])
    y = _sum_of_warps(sums, 0, SUMS, OUT_ROWS)
    if RMS_WIDTH > 0:
        rstd = _rstd_of_columns(squares, K, rms_eps, ROWS, WARPS, gl.SliceLayout(0, OUT))[None, :]
        y *= rstd
    if not IS_INT4:
        y *= gain
    if bias_ptr is not None:
        y += _load_columns(bias_ptr, n, n_in_range)
    if SWIGLU:
        up = _sum_of_warps(sums, OUT_ROWS, SUMS, OUT_ROWS)
        if RMS_WIDTH > 0:
            up *= rstd
        if not IS_INT4:
            up *= up_gain
        if bias_ptr is not None:
            up += _load_columns(bias_ptr, N + n, n_in_range)
        y = y / (1.0 + gl.exp(-y)) * up
    if residual_ptr is not None:
        y += residual
    out_ptrs = out_ptr + m_64 * stride_om + n[:, None]
    gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=in_range)
