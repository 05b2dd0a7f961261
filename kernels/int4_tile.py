"""The loop of the int4 GEMM: y = epilogue(x W^T) with W packed as `int4_packing` draws it.

A step takes STEP words of every row, a chunk's or part of it, and multiplies them plane by plane
with the matching columns of x. The words go asynchronously to shared memory and from there to
registers as the left operand, where a plane becomes bfloat16 in three instructions per two
weights (shift, AND-OR, subtract): 128 + (q + 8) is what a nibble under the exponent of 128 reads.

Scales multiply the float32 product of their group; where a program has many rows of x, that costs
more than multiplying the weights, and SCALE_WEIGHTS does the latter.

Does not know which tile suits which shape.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.gemm_epilogue import finish_tile
from kernels.gemm_tile import num_tiles_n, prefetch_to_l2, tile_of_program, weight_rows


@triton.constexpr_function
def _plane_to_bfloat16_asm(plane):
    """Nibble `plane` of two words in a register to a pair of bfloat16, exactly."""
    shift = f"shr.b32 t, $1, {4 * plane};" if plane else "mov.b32 t, $1;"
    return (
        "{ .reg .b32 t, c; mov.b32 c, 0x43084308;"
        f" {shift} lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; sub.rn.bf16x2 $0, t, c; }}"
    )


@triton.jit
def _unpack_plane(words, PLANE_INDEX: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Weights of one plane, [BLOCK_N, STEP] in DTYPE."""
    if INTERPRETED or tl.bfloat16 != DTYPE:
        return (((words >> (4 * PLANE_INDEX)) & 15) - 8).to(DTYPE)
    else:
        return tl.inline_asm_elementwise(
            _plane_to_bfloat16_asm(PLANE_INDEX),
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _int4_kernel(
    x_ptr,  # [M, K]
    words_ptr,  # [N, K / 4] int16, with SWIGLU [2 N, K / 4]: gate rows, then up rows
    scale_ptr,  # [N or 2 N, K / group_size]
    row_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,  # [M, N]
    parts_ptr,  # [num_tiles, NUM_SPLITS, PART] float32
    counters_ptr,  # [num_tiles] int32
    stride_xm: tl.int64,
    stride_wn: tl.int64,
    stride_sn: tl.int64,
    stride_sg: tl.int64,
    stride_rm: tl.int64,
    stride_om: tl.int64,
    M,
    N,
    K,
    num_groups,
    rms_eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLANE: tl.constexpr,
    STEP: tl.constexpr,  # words of a row in a step: PLANE or half of it
    GROUPS: tl.constexpr,  # groups in a chunk: 2 or 4
    NUM_SPLITS: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    HAS_RMS: tl.constexpr,
    SWIGLU: tl.constexpr,
    EVEN_K: tl.constexpr,  # K fills its last chunk
    PREFETCH_LINES: tl.constexpr,
    PREFETCH_GROUPS: tl.constexpr,
    USE_PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    PARTS: tl.constexpr = PLANE // STEP
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tile_of_program(tile, tl.cdiv(M, BLOCK_M), num_tiles_n(N, BLOCK_N, SWIGLU))
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, STEP)
    num_steps = tl.cdiv(K, 4 * PLANE) * PARTS
    steps_per_split = tl.cdiv(num_steps, NUM_SPLITS)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, num_steps)
    rows = weight_rows(tile_n, tl.arange(0, BLOCK_N), N, BLOCK_N, SWIGLU)
    words_ptrs = words_ptr + rows[:, None] * stride_wn + j[None, :]
    scale_ptrs = scale_ptr + rows * stride_sn
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + j[None, :]
    if USE_PDL:
        last_word = num_steps * STEP - 1
        lines = tl.minimum(begin * STEP + tl.arange(0, PREFETCH_LINES) * 64, last_word)
        prefetch_to_l2(words_ptr + rows[:, None] * stride_wn + lines[None, :])
        # Scales are read where they are needed, too late for memory: all of the program's now.
        # A line holds those of 32 rows and more where neighbouring rows' scales are neighbours.
        groups = begin // PARTS * GROUPS + tl.arange(0, PREFETCH_GROUPS)
        group_offsets = tl.minimum(groups, num_groups - 1).to(tl.int64) * stride_sg
        some_rows = weight_rows(tile_n, tl.arange(0, BLOCK_N // 32) * 32, N, BLOCK_N, SWIGLU)
        prefetch_to_l2(scale_ptr + group_offsets[:, None] + some_rows[None, :] * stride_sn)
        gdc_wait()
    DTYPE: tl.constexpr = tl.float32 if INTERPRETED else x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    sum_sq = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(begin, end):
        words = tl.load(words_ptrs + step * STEP, eviction_policy="evict_first")
        squares = tl.zeros((BLOCK_M, STEP), tl.float32)
        chunk = step // PARTS
        k_0 = chunk * (4 * PLANE) + step % PARTS * STEP
        for group in tl.static_range(GROUPS):
            # A group past the end of K meets zeros of x; its scale is that of the last one.
            index = tl.minimum(chunk * GROUPS + group, num_groups - 1)
            scale = tl.load(scale_ptrs + index * stride_sg)  # [BLOCK_N]
            product = acc if SCALE_WEIGHTS else tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.static_range(4 // GROUPS):
                k = k_0 + (group * (4 // GROUPS) + i) * PLANE
                in_range = (m < M)[:, None] if EVEN_K else (m < M)[:, None] & (k + j < K)[None, :]
                x = tl.load(x_ptrs + k, mask=in_range, other=0.0).to(DTYPE)  # [BLOCK_M, STEP]
                weight = _unpack_plane(words, group * (4 // GROUPS) + i, DTYPE, INTERPRETED)
                if SCALE_WEIGHTS:
                    weight = weight * scale.to(DTYPE)[:, None]
                product = tl.dot(weight, x.T, product, input_precision="ieee")
                if HAS_RMS:
                    x_32 = x.to(tl.float32)
                    squares += x_32 * x_32
            if SCALE_WEIGHTS:
                acc = product
            else:
                acc += product * scale.to(tl.float32)[:, None]
        if HAS_RMS:
            sum_sq += tl.sum(squares, axis=1)
    if USE_PDL:
        # Not before: programs of the next kernel that wait would take the room of this one's.
        gdc_launch_dependents()
    finish_tile(
        acc, sum_sq, m, tile_n, tile, split,
        None, row_scale_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr, counters_ptr,
        stride_rm, stride_om, M, N, K, rms_eps, BLOCK_M, BLOCK_N, NUM_SPLITS, HAS_RMS, SWIGLU,
    )  # fmt: skip
