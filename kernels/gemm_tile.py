"""The two loops every GEMM with a row-major weight [N, K] runs: y = epilogue(x W^T).

* `_gemv_kernel` (M 1-4): a program holds a few weight rows; each thread multiplies 16-byte pieces
  in float32 and the sum over threads is taken once, at the end. The next tile of weights is loaded
  while this one is multiplied, and the first one before the wait for the previous kernel.
* `_dot_kernel` (any M): tensor cores, with W as the left operand, so that the few rows of x are
  the narrow side (8 at least) and narrow weights (int8, e4m3) are widened in registers on their
  way to it. Asynchronous copies, split-K, first weight tiles fetched into L2 before the wait.

Does not know which tile suits which shape: the launchers of each operation do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.gemm_epilogue import finish_tile, store_tile


@triton.constexpr_function
def _asm_of_pairs(num_pairs, selectors, operation, operands):
    """Assembly that spreads 2 * num_pairs bytes of a register and makes pairs of bfloat16 of them.

    A selector moves two bytes to the 16-bit halves of t; `operation` writes `operands` to a pair.
    """
    steps = [
        f"prmt.b32 t, ${num_pairs}, 0, {selectors[i]}; {operation} ${i}, {operands};"
        for i in range(num_pairs)
    ]
    return "{ .reg .b32 t, a, b; " + " ".join(steps) + " }"


@triton.constexpr_function
def _int8_asm(num_pairs):
    """Exact, without the conversion units.

    Low seven bits under the exponent of 128 read 128 + (q & 127); 128, or 256 where q is negative,
    is subtracted.
    """
    return _asm_of_pairs(
        num_pairs,
        ("0x4140", "0x4342"),
        "lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA;"
        " lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA; sub.rn.bf16x2",
        "a, b",
    )


@triton.constexpr_function
def _e4m3_asm(num_pairs):
    """Exponent and mantissa move to their places in bfloat16; multiplying by 2^120 corrects the
    bias and gives subnormals their value. NaN is not kept.
    """
    return _asm_of_pairs(
        num_pairs,
        ("0x1404", "0x3424"),
        "and.b32 a, t, 0x80008000; shr.b32 t, t, 4; lop3.b32 t, t, 0x07F007F0, a, 0xEA;"
        " mov.b32 b, 0x7B807B80; mul.rn.bf16x2",
        "t, b",
    )


@triton.jit
def widen(weight, DTYPE: tl.constexpr, NUM_PAIRS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Weights in the dtype of the multiplication; bytes go to bfloat16 in NUM_PAIRS (1, 2) pairs
    at a time.
    """
    if weight.dtype == DTYPE:
        return weight
    elif INTERPRETED or tl.bfloat16 != DTYPE:
        return weight.to(DTYPE)
    elif weight.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            _int8_asm(NUM_PAIRS), "=r,r" if NUM_PAIRS == 1 else "=r,=r,r", [weight],
            dtype=tl.bfloat16, is_pure=True, pack=2 * NUM_PAIRS,
        )  # fmt: skip
    elif weight.dtype == tl.float8e4nv:
        return tl.inline_asm_elementwise(
            _e4m3_asm(NUM_PAIRS), "=r,r" if NUM_PAIRS == 1 else "=r,=r,r", [weight],
            dtype=tl.bfloat16, is_pure=True, pack=2 * NUM_PAIRS,
        )  # fmt: skip
    else:
        return weight.to(DTYPE)


@triton.jit
def prefetch_to_l2(ptrs):
    """Ask for the cache lines at `ptrs`; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_rows(ptrs, k, K, EVEN_K: tl.constexpr):
    # The weights pass through once; what stays in L2 is the activations.
    if EVEN_K:
        return tl.load(ptrs, eviction_policy="evict_first")
    else:
        return tl.load(ptrs, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_x(row_ptr, k, K, EVEN_K: tl.constexpr):
    """[1, BLOCK_K]"""
    if EVEN_K:
        return tl.load(row_ptr + k[None, :])
    else:
        return tl.load(row_ptr + k[None, :], mask=(k < K)[None, :], other=0.0)


@triton.jit
def weight_rows(tile_n, i, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Rows `i` of a tile in the weight: neighbours, or half as many gate rows, then theirs of up.
    Rows past the end are the last one, read and not stored, which saves a mask.
    """
    if SWIGLU:
        HALF: tl.constexpr = BLOCK_N // 2
        n = tl.minimum(tile_n * HALF + i % HALF, N - 1).to(tl.int64)
        return n + (i // HALF).to(tl.int64) * N
    else:
        return tl.minimum(tile_n * BLOCK_N + i, N - 1).to(tl.int64)


@triton.jit
def _gemv_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K], with SWIGLU [2 N, K]: gate rows, then up rows
    column_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,  # [M, N]
    stride_xm: tl.int64,
    stride_wn: tl.int64,
    stride_rm: tl.int64,
    stride_om: tl.int64,
    M,
    N,
    K,
    rms_eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,  # neighbouring weights a thread loads at once
    HAS_RMS: tl.constexpr,
    SWIGLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    tile_n = tl.program_id(0)
    # Weights and x are held by the same threads when both are loaded in vectors of this length.
    k = tl.max_contiguous(tl.arange(0, BLOCK_K), VECTOR)
    rows = weight_rows(tile_n, tl.arange(0, BLOCK_N), N, BLOCK_N, SWIGLU)
    weight_ptrs = weight_ptr + rows[:, None] * stride_wn + k[None, :]
    weight = _load_rows(weight_ptrs, k, K, EVEN_K)  # [BLOCK_N, BLOCK_K]
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    # A row of x at a time, in two dimensions: a third one would send every tile of weights
    # through shared memory.
    x: tl.tuple = ()
    acc: tl.tuple = ()
    sum_sq: tl.tuple = ()
    for i in tl.static_range(BLOCK_M):
        x += (_load_x(x_ptr + stride_xm * tl.minimum(i, M - 1), k, K, EVEN_K),)
        acc += (tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32),)
        sum_sq += (tl.zeros((1, BLOCK_K), tl.float32),)
    for k_0 in range(0, K, BLOCK_K):
        # At the end of K the last tile is read again, from cache.
        k_next = tl.where(k_0 + BLOCK_K < K, k_0 + BLOCK_K, k_0)
        next_weight = _load_rows(weight_ptrs + k_next, k_next + k, K, EVEN_K)
        weight_32 = weight.to(tl.float32)
        next_x: tl.tuple = ()
        next_acc: tl.tuple = ()
        next_sum_sq: tl.tuple = ()
        for i in tl.static_range(BLOCK_M):
            next_x += (_load_x(x_ptr + stride_xm * tl.minimum(i, M - 1), k_next + k, K, EVEN_K),)
            x_32 = x[i].to(tl.float32)  # [1, BLOCK_K]
            products = tl.reshape(weight_32 * x_32, (BLOCK_N, BLOCK_K // VECTOR, VECTOR))
            next_acc += (acc[i] + tl.sum(products, axis=2),)
            next_sum_sq += (sum_sq[i] + x_32 * x_32 if HAS_RMS else sum_sq[i],)
        weight, x, acc, sum_sq = next_weight, next_x, next_acc, next_sum_sq
    for i in tl.static_range(BLOCK_M):
        store_tile(
            tl.sum(acc[i], axis=1)[:, None], tl.sum(sum_sq[i], axis=1),
            i + tl.arange(0, 1), tile_n,
            column_scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr,
            stride_rm, stride_om, M, N, K, rms_eps, 1, BLOCK_N, HAS_RMS, SWIGLU,
        )  # fmt: skip


@triton.jit
def _dot_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K], with SWIGLU [2 N, K]: gate rows, then up rows
    column_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,  # [M, N]
    parts_ptr,  # [num_tiles, NUM_SPLITS, PART] float32
    counters_ptr,  # [num_tiles] int32
    stride_xm: tl.int64,
    stride_wn: tl.int64,
    stride_rm: tl.int64,
    stride_om: tl.int64,
    M,
    N,
    K,
    rms_eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_RMS: tl.constexpr,
    SWIGLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAST_ACCUMULATION: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    LINE: tl.constexpr,
    USE_PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tile_of_program(tile, tl.cdiv(M, BLOCK_M), num_tiles_n(N, BLOCK_N, SWIGLU))
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    k_per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), NUM_SPLITS) * BLOCK_K
    k_begin = split * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)
    rows = weight_rows(tile_n, tl.arange(0, BLOCK_N), N, BLOCK_N, SWIGLU)
    weight_ptrs = weight_ptr + rows[:, None] * stride_wn + k[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    if USE_PDL:
        lines = tl.minimum(k_begin + tl.arange(0, PREFETCH_LINES) * LINE, K - 1)
        prefetch_to_l2(weight_ptr + rows[:, None] * stride_wn + lines[None, :])
        gdc_wait()
    # The interpreter does not multiply e4m3.
    DTYPE: tl.constexpr = tl.float32 if INTERPRETED else x_ptr.dtype.element_ty
    # How many bytes the tensor cores' operand layout leaves together in a thread: with fewer than
    # 16 rows of x it is the one of single warps, else that of warp groups.
    NUM_PAIRS: tl.constexpr = 2 if BLOCK_M < 16 else 1
    # Hopper adds e4m3 products with 14 bits; parts of BLOCK_K are moved to float32 registers.
    IMPRECISE: tl.constexpr = None if FAST_ACCUMULATION else BLOCK_K
    IS_WIDENED: tl.constexpr = weight_ptr.dtype.element_ty != x_ptr.dtype.element_ty
    ENDS_IN_STEP: tl.constexpr = HAS_RMS or IS_WIDENED
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    sum_sq = tl.zeros((BLOCK_M,), tl.float32)
    for k_0 in range(k_begin, k_end, BLOCK_K):
        x_mask = (m < M)[:, None] if EVEN_K else (m < M)[:, None] & (k_0 + k < K)[None, :]
        x = tl.load(x_ptrs + k_0, mask=x_mask, other=0.0).to(DTYPE)
        weight = _load_rows(weight_ptrs + k_0, k_0 + k, K, EVEN_K)
        weight = widen(weight, DTYPE, NUM_PAIRS, INTERPRETED)
        if ENDS_IN_STEP:
            # A sum of its own ends the product in this step. Left under way into the next one, as
            # products are otherwise, it would still read x where the pipeline, which counts only
            # on the squares below, already copies the x of three steps on; or widened weights in
            # registers that the next step's take.
            acc += tl.dot(
                weight, x.T, input_precision="ieee", max_num_imprecise_acc=BLOCK_K
            )  # [BLOCK_N, BLOCK_M]
            if HAS_RMS:
                x_32 = x.to(tl.float32)
                sum_sq += tl.sum(x_32 * x_32, axis=1)
        else:
            acc = tl.dot(
                weight, x.T, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE
            )  # [BLOCK_N, BLOCK_M]
    if USE_PDL:
        # Not before: programs of the next kernel that wait would take the room of this one's.
        gdc_launch_dependents()
    finish_tile(
        acc, sum_sq, m, tile_n, tile, split,
        column_scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr, counters_ptr,
        stride_rm, stride_om, M, N, K, rms_eps, BLOCK_M, BLOCK_N, NUM_SPLITS, HAS_RMS, SWIGLU,
    )  # fmt: skip


@triton.jit
def num_tiles_n(N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Tiles that cover N output columns."""
    return tl.cdiv(N, BLOCK_N // 2 if SWIGLU else BLOCK_N)


@triton.jit
def tile_of_program(program, num_tiles_m, num_tiles_n):
    """Programs near in time share weights and rows: bands of 8 tiles of M, N inside a band."""
    band = program // (8 * num_tiles_n)
    band_size = tl.minimum(num_tiles_m - band * 8, 8)
    inside = program % (8 * num_tiles_n)
    return band * 8 + inside % band_size, inside // band_size


@triton.jit
def _rstd_kernel(
    x_ptr,  # [M, K]
    rstd_ptr,  # [M] float32
    stride_xm: tl.int64,
    K,
    rms_eps,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k_0 in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k_0 + k, mask=k_0 + k < K, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(rstd_ptr + row, tl.rsqrt(tl.sum(squares, axis=0) / K + rms_eps))
