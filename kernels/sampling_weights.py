"""Keys and weights of tokens, and their sums per chunk, for rows that draw.

    distance = (best score - score) / temperature >= 0
    key      = bits of distance, or beyond all keys where distance > -log(min_p)        min-p
    weight   = exp(-distance), 0 beyond the threshold

A non-negative float32 orders like its bits, so equal keys are ties and a threshold is a key.

    weigh      keys and chunk sums; of rows with FILTERS a histogram of distances
    reweigh    chunk sums anew for rows with FILTERS, once their threshold is known

Bytes: vocab_size * (itemsize + 4) a row for weigh, vocab_size * 4 for reweigh.
Bound: copy bandwidth; with few rows the latency of one chunk.
Source: min-p is Nguyen et al., "Turning Up the Heat", 2024.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sampling_rows import (
    DROPPED,
    EVERY_KEY,
    MIN_P_DISTANCE,
    NUM_BINS,
    TEMPERATURE,
    RowFlag,
    SamplingState,
    SamplingWorkspace,
    bin_of,
    load_logits,
    num_warps_of,
    row_flags,
    row_float,
    weight_of,
)

_ADJUSTS = tl.constexpr(int(RowFlag.ADJUSTS))
_DRAWS = tl.constexpr(int(RowFlag.DRAWS))
_FILTERS = tl.constexpr(int(RowFlag.FILTERS))


@triton.jit
def _weigh_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    rows_ptr,  # int32 [num_rows, WORDS]
    scores_ptr,  # int32 [num_rows, scores_stride]: scores in, keys out
    chunk_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_sum_ptr,  # float32 [num_rows, num_chunks]
    chunk_count_ptr,  # float32 [num_rows, num_chunks]
    chunk_weights_ptr,  # int64 [num_rows, num_chunks]
    bin_scale_ptr,  # float32 [num_rows]
    histogram_ptr,  # int32 [num_rows, BINS]
    logits_stride: tl.int64,
    scores_stride: tl.int64,
    vocab_size,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    flags = row_flags(rows_ptr, row)
    if flags & _DRAWS == 0:
        return
    num_chunks = tl.num_programs(0)
    chunks = tl.arange(0, CHUNKS)
    inside_row = chunks < num_chunks
    maxima = tl.load(
        chunk_max_ptr + row * num_chunks + chunks, mask=inside_row, other=-float("inf")
    )
    best = tl.max(maxima, axis=0)
    columns = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < vocab_size
    key_ptrs = scores_ptr + row * scores_stride + columns
    if flags & _ADJUSTS != 0:
        x = tl.load(key_ptrs, mask=inside, other=0).to(tl.float32, bitcast=True)
    else:
        x = load_logits(logits_ptr + row * logits_stride, columns, inside)  # [BLOCK] float32
    # An infinite best score is at no distance from itself.
    is_best = x == best
    gap = tl.where(is_best, 0.0, best - tl.where(is_best, 0.0, x))
    temperature = row_float(rows_ptr, row, TEMPERATURE)
    distance = tl.div_rn(gap, temperature)
    is_kept = inside & (distance <= row_float(rows_ptr, row, MIN_P_DISTANCE))
    keys = tl.where(is_kept, distance.to(tl.int32, bitcast=True), DROPPED)  # [BLOCK]
    tl.store(key_ptrs, keys, mask=inside)
    weight = tl.sum(weight_of(keys, EVERY_KEY), axis=0)
    tl.store(chunk_weights_ptr + row * num_chunks + chunk, weight)
    if flags & _FILTERS != 0:
        at = row * num_chunks + chunks
        total = tl.sum(tl.load(chunk_sum_ptr + at, mask=chunks < num_chunks, other=0.0), axis=0)
        count = tl.sum(tl.load(chunk_count_ptr + at, mask=chunks < num_chunks, other=0.0), axis=0)
        # As far beyond the mean as the mean is from the best: most of any usual distribution.
        reach = 2.0 * (best - total / tl.maximum(count, 1.0)) / temperature
        scale = BINS / tl.minimum(tl.maximum(reach, 1e-20), 1e20)
        if chunk == 0:
            tl.store(bin_scale_ptr + row, scale)
        counts = tl.histogram(bin_of(keys, scale, BINS), BINS, mask=is_kept)
        bins = tl.arange(0, BINS)
        tl.atomic_add(histogram_ptr + row * BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _reweigh_kernel(
    rows_ptr,  # int32 [num_rows, WORDS]
    keys_ptr,  # int32 [num_rows, keys_stride]
    threshold_ptr,  # int32 [num_rows]
    chunk_weights_ptr,  # int64 [num_rows, num_chunks]
    keys_stride: tl.int64,
    vocab_size,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    if row_flags(rows_ptr, row) & _FILTERS == 0:
        return
    columns = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    keys_ptrs = keys_ptr + row * keys_stride + columns
    keys = tl.load(keys_ptrs, mask=columns < vocab_size, other=DROPPED)
    weight = tl.sum(weight_of(keys, tl.load(threshold_ptr + row)), axis=0)
    tl.store(chunk_weights_ptr + row * tl.num_programs(0) + chunk, weight)


def weigh(
    logits: Tensor, *, state: SamplingState, workspace: SamplingWorkspace, use_pdl: bool
) -> None:
    """After `score`: keys and chunk weights of the rows that draw."""
    num_rows, vocab_size = logits.shape
    block = workspace.block
    num_chunks = triton.cdiv(vocab_size, block)
    chunk_max, _, _, sums, counts = workspace.chunk_floats.unbind(0)
    _weigh_kernel[(num_chunks, num_rows)](
        logits,
        state.rows,
        workspace.scores,
        chunk_max,
        sums,
        counts,
        workspace.chunk_weights,
        workspace.bin_scale,
        workspace.histogram,
        logits.stride(0),
        workspace.scores.stride(0),
        vocab_size,
        BLOCK=block,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BINS=NUM_BINS,
        USE_PDL=use_pdl,
        num_warps=num_warps_of(block),
        launch_pdl=use_pdl,
    )


def reweigh(
    num_rows: int,
    vocab_size: int,
    *,
    state: SamplingState,
    workspace: SamplingWorkspace,
    use_pdl: bool,
) -> None:
    """After `find_thresholds`: chunk weights of the rows with FILTERS."""
    block = workspace.block
    _reweigh_kernel[(triton.cdiv(vocab_size, block), num_rows)](
        state.rows,
        workspace.scores,
        workspace.threshold,
        workspace.chunk_weights,
        workspace.scores.stride(0),
        vocab_size,
        BLOCK=block,
        USE_PDL=use_pdl,
        num_warps=num_warps_of(block),
        launch_pdl=use_pdl,
    )
