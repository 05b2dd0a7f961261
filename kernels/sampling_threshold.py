"""The threshold of top-k and top-p of each row, exactly and without sorting.

    distance <= the k-th smallest                                            top-k
    distance <= the smallest t with sum of weights up to t >= top_p * sum    top-p, of what is left

Ties of the last token stay. Distances are compared by their keys (float32 bits).

    gather       the bins of the histogram that must hold the threshold; tokens in them become
                 candidates, the weight of those before them is summed
    threshold    bisection over the candidates' keys, one program a row

The histogram counts exactly and bounds weights from both sides (by the edges of a bin, summed from
the best token on or back from the exact sum of the row), so the interval is certain. A row with
more candidates than fit is bisected in full: the same result, in more time. The outcome does not
depend on the order of candidates or on how a row is cut.

Bytes: vocab_size * 4 a row for gather, then the candidates some 20 times from L1 or L2.
Bound: copy bandwidth; with few rows the latency of some 20 dependent sums.
Source: top-k is Fan et al., "Hierarchical Neural Story Generation", 2018; top-p Holtzman et al.,
"The Curious Case of Neural Text Degeneration", 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sampling_rows import (
    CANDIDATE_CAPACITY,
    DROPPED,
    EVERY_KEY,
    NUM_BINS,
    TOP_K,
    TOP_P_F64,
    WEIGHT_ONE,
    WORDS,
    RowFlag,
    SamplingState,
    SamplingWorkspace,
    bin_of,
    num_warps_of,
    row_flags,
    weight_of,
)

_FILTERS = tl.constexpr(int(RowFlag.FILTERS))
_EDGE_SLACK = tl.constexpr(1e-6)
"""Relative, beyond the rounding of a few operations in float32."""
_EXP_SLACK = tl.constexpr(1e-5)
"""Relative, beyond the error of exp in float32."""
_SEARCH_BLOCK = 4096


@triton.jit
def _nearest(bin, scale):
    """No distance in `bin` is smaller: the edge, moved by more than the rounding of bin_of."""
    return bin.to(tl.float32) / scale * (1.0 - _EDGE_SLACK)


@triton.jit
def _farthest(bin, scale, BINS: tl.constexpr):
    edge = (bin + 1).to(tl.float32) / scale * (1.0 + _EDGE_SLACK)
    return tl.where(bin >= BINS - 1, float("inf"), edge)


@triton.jit
def _row_weight(chunk_weights_ptr, num_chunks, CHUNKS: tl.constexpr):
    chunks = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(chunk_weights_ptr + chunks, mask=chunks < num_chunks, other=0), axis=0)


@triton.jit
def _interval(
    histogram_ptr,  # [BINS] of the row
    scale,
    top_k,
    top_p,  # float64
    row_weight,  # int64
    BINS: tl.constexpr,
):
    """First and last bin that may hold the threshold, tokens before and in them, use of top_k."""
    bins = tl.arange(0, BINS)  # [BINS]
    counts = tl.load(histogram_ptr + bins)
    num_kept = tl.sum(counts, axis=0)
    uses_top_k = (top_k > 0) & (top_k < num_kept)
    most = tl.exp(-_nearest(bins, scale)).to(tl.float64) * (WEIGHT_ONE * (1.0 + _EXP_SLACK))
    least = tl.exp(-_farthest(bins, scale, BINS)).to(tl.float64)
    # A weight is truncated to an integer: it is less than exp says by less than one unit.
    least = tl.maximum(least * (WEIGHT_ONE * (1.0 - _EXP_SLACK)) - 1.0, 0.0)
    most_up_to = tl.cumsum(counts * most, axis=0)
    least_up_to = tl.cumsum(counts * least, axis=0)
    total = row_weight.to(tl.float64)
    most_after = tl.max(most_up_to, axis=0) - most_up_to
    least_after = tl.max(least_up_to, axis=0) - least_up_to
    # Float64 sums of up to 2^20 weights are off by less than this share.
    rounding = total * 1e-9
    most_up_to = tl.minimum(most_up_to, total - least_after) + rounding
    least_up_to = tl.maximum(least_up_to, total - most_after) - rounding
    wanted = top_p * total
    first = tl.sum((most_up_to < wanted).to(tl.int32), axis=0)
    last = tl.sum((least_up_to < wanted).to(tl.int32), axis=0)
    if uses_top_k:
        last = tl.sum((tl.cumsum(counts, axis=0) < top_k).to(tl.int32), axis=0)
        # With top-p as well, its sum begins at the best token.
        first = tl.where(top_p < 1.0, 0, last)
    last = tl.minimum(last, BINS - 1)
    first = tl.minimum(first, last)
    num_before = tl.sum(tl.where(bins < first, counts, 0), axis=0)
    num_inside = tl.sum(tl.where((bins >= first) & (bins <= last), counts, 0), axis=0)
    return first, last, num_before, num_inside, uses_top_k


@triton.jit
def _gather_kernel(
    rows_ptr,  # int32 [num_rows, WORDS]
    rows_f64_ptr,  # float64 [num_rows, WORDS / 2], the same memory
    keys_ptr,  # int32 [num_rows, keys_stride]: keys, then candidates
    chunk_weights_ptr,  # int64 [num_rows, num_chunks]
    bin_scale_ptr,  # float32 [num_rows]
    histogram_ptr,  # int32 [num_rows, BINS]
    num_candidates_ptr,  # int32 [num_rows]
    weight_above_ptr,  # int64 [num_rows]
    keys_stride: tl.int64,
    vocab_size,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
    CAPACITY: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    if row_flags(rows_ptr, row) & _FILTERS == 0:
        return
    num_chunks = tl.num_programs(0)
    row_weight = _row_weight(chunk_weights_ptr + row * num_chunks, num_chunks, CHUNKS)
    top_k = tl.load(rows_ptr + row * WORDS + TOP_K)
    top_p = tl.load(rows_f64_ptr + row * (WORDS // 2) + TOP_P_F64)
    scale = tl.load(bin_scale_ptr + row)
    first, last, _, num_inside, _ = _interval(
        histogram_ptr + row * BINS, scale, top_k, top_p, row_weight, BINS
    )
    if num_inside > CAPACITY:
        return
    keys_ptr += row * keys_stride
    columns = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    keys = tl.load(keys_ptr + columns, mask=columns < vocab_size, other=DROPPED)
    bins = bin_of(keys, scale, BINS)
    is_candidate = (bins >= first) & (bins <= last)
    position = tl.cumsum(is_candidate.to(tl.int32), axis=0)  # [BLOCK]
    count = tl.max(position, axis=0)
    if count > 0:
        start = tl.atomic_add(num_candidates_ptr + row, count, sem="relaxed")
        candidates_ptr = keys_ptr + (keys_stride - CAPACITY)
        tl.store(candidates_ptr + start + position - 1, keys, mask=is_candidate)
    above = tl.sum(tl.where(bins < first, weight_of(keys, EVERY_KEY), 0), axis=0)
    if above > 0:
        tl.atomic_add(weight_above_ptr + row, above, sem="relaxed")


@triton.jit
def _total(keys_ptr, num_keys, threshold, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Number or weight of the keys up to `threshold`, float64: exact below 2^53."""
    sums = tl.zeros((BLOCK,), tl.int64)
    first = 0
    while first < num_keys:
        at = first + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + at, mask=at < num_keys, other=DROPPED)
        if BY_WEIGHT:
            sums += weight_of(keys, threshold)
        else:
            sums += (keys <= threshold).to(tl.int64)
        first += BLOCK
    return tl.sum(sums, axis=0).to(tl.float64)


@triton.jit
def _smallest_threshold(
    keys_ptr, num_keys, low, high, wanted, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """The smallest key in [low, high] up to which the total is `wanted`; high reaches it."""
    if _total(keys_ptr, num_keys, low, BY_WEIGHT, BLOCK) >= wanted:
        high = low
    while low < high:
        middle = low + (high - low) // 2
        reaches = _total(keys_ptr, num_keys, middle, BY_WEIGHT, BLOCK) >= wanted
        high = tl.where(reaches, middle, high)
        low = tl.where(reaches, low, middle + 1)
    return low


@triton.jit
def _threshold_kernel(
    rows_ptr,  # int32 [num_rows, WORDS]
    rows_f64_ptr,  # float64 [num_rows, WORDS / 2], the same memory
    keys_ptr,  # int32 [num_rows, keys_stride]: keys, then candidates
    chunk_weights_ptr,  # int64 [num_rows, num_chunks]
    bin_scale_ptr,  # float32 [num_rows]
    histogram_ptr,  # int32 [num_rows, BINS]
    weight_above_ptr,  # int64 [num_rows]
    threshold_ptr,  # int32 [num_rows]
    keys_stride: tl.int64,
    vocab_size,
    num_chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
    CAPACITY: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    if row_flags(rows_ptr, row) & _FILTERS == 0:
        tl.store(threshold_ptr + row, EVERY_KEY)
        return
    row_weight = _row_weight(chunk_weights_ptr + row * num_chunks, num_chunks, CHUNKS)
    top_k = tl.load(rows_ptr + row * WORDS + TOP_K)
    top_p = tl.load(rows_f64_ptr + row * (WORDS // 2) + TOP_P_F64)
    scale = tl.load(bin_scale_ptr + row)
    first, last, num_above, num_keys, uses_top_k = _interval(
        histogram_ptr + row * BINS, scale, top_k, top_p, row_weight, BINS
    )
    weight_above = tl.load(weight_above_ptr + row).to(tl.float64)
    keys_ptr += row * keys_stride + (keys_stride - CAPACITY)
    if num_keys > CAPACITY:
        keys_ptr -= keys_stride - CAPACITY
        num_keys = vocab_size
        num_above = 0
    low = _nearest(first, scale).to(tl.int32, bitcast=True)
    high = _farthest(last, scale, BINS).to(tl.int32, bitcast=True)
    threshold = EVERY_KEY
    wanted = row_weight.to(tl.float64)
    if uses_top_k:
        rest = (top_k - num_above).to(tl.float64)
        threshold = _smallest_threshold(keys_ptr, num_keys, low, high, rest, False, BLOCK)
        high = threshold
        if top_p < 1.0:
            wanted = _total(keys_ptr, num_keys, threshold, True, BLOCK)
    if top_p < 1.0:
        rest = wanted * top_p - weight_above
        threshold = _smallest_threshold(keys_ptr, num_keys, low, high, rest, True, BLOCK)
    tl.store(threshold_ptr + row, threshold)


def find_thresholds(
    num_rows: int,
    vocab_size: int,
    *,
    state: SamplingState,
    workspace: SamplingWorkspace,
    use_pdl: bool,
) -> None:
    """After `weigh`: workspace.threshold, EVERY_KEY for rows without FILTERS."""
    block, width = workspace.block, workspace.scores.stride(0)
    num_chunks = triton.cdiv(vocab_size, block)
    rows_f64 = state.rows.view(torch.float64)
    _gather_kernel[(num_chunks, num_rows)](
        state.rows,
        rows_f64,
        workspace.scores,
        workspace.chunk_weights,
        workspace.bin_scale,
        workspace.histogram,
        workspace.num_candidates,
        workspace.weight_above,
        width,
        vocab_size,
        BLOCK=block,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BINS=NUM_BINS,
        CAPACITY=CANDIDATE_CAPACITY,
        USE_PDL=use_pdl,
        num_warps=num_warps_of(block),
        launch_pdl=use_pdl,
    )
    _threshold_kernel[(num_rows,)](
        state.rows,
        rows_f64,
        workspace.scores,
        workspace.chunk_weights,
        workspace.bin_scale,
        workspace.histogram,
        workspace.weight_above,
        workspace.threshold,
        width,
        vocab_size,
        num_chunks,
        BLOCK=_SEARCH_BLOCK,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BINS=NUM_BINS,
        CAPACITY=CANDIDATE_CAPACITY,
        USE_PDL=use_pdl,
        num_warps=num_warps_of(_SEARCH_BLOCK),
        launch_pdl=use_pdl,
    )
