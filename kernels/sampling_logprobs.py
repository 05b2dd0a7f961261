"""The most likely tokens of a row by its raw logits, with their log-probabilities.

    logprob = logit - log(sum of exp(logits))          best first, equal logits by token id

The best of every chunk are picked one after another, then the best of those. Logits are compared
as integers that order alike, so that a picked one can be replaced by what is below all of them.

Bytes: vocab_size * itemsize a row with alternatives. Bound: num_top dependent reductions of a
chunk, a few microseconds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sampling_rows import (
    MAX_TOP_LOGPROBS,
    NUM_TOP,
    SLOT,
    WORDS,
    SampledRows,
    SamplingState,
    SamplingWorkspace,
    load_logits,
    log_sum_exp,
    num_warps_of,
)

_PICKED = tl.constexpr(-(1 << 31))


@triton.jit
def _num_top(rows_ptr, row):
    slot = tl.load(rows_ptr + row * WORDS + SLOT)
    return tl.where(slot < 0, 0, tl.load(rows_ptr + row * WORDS + NUM_TOP))


@triton.jit
def _chunk_top_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    rows_ptr,  # int32 [num_rows, WORDS]
    top_keys_ptr,  # int32 [num_rows, num_chunks, TOP]
    top_ids_ptr,  # int32 [num_rows, num_chunks, TOP]
    logits_stride: tl.int64,
    vocab_size,
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_top = _num_top(rows_ptr, row)
    if num_top == 0:
        return
    columns = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < vocab_size
    # Zero added to it, a negative zero becomes the other one.
    x = load_logits(logits_ptr + row * logits_stride, columns, inside) + 0.0  # [BLOCK] float32
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), _PICKED)  # [BLOCK]
    out = (row * tl.num_programs(0) + chunk) * TOP
    i = 0
    while i < num_top:
        best, index = tl.max(keys, axis=0, return_indices=True)
        tl.store(top_keys_ptr + out + i, best)
        tl.store(top_ids_ptr + out + i, chunk * BLOCK + index)
        keys = tl.where(columns == chunk * BLOCK + index, _PICKED, keys)
        i += 1


@triton.jit
def _row_top_kernel(
    rows_ptr,  # int32 [num_rows, WORDS]
    top_keys_ptr,  # int32 [num_rows, num_chunks, TOP]
    top_ids_ptr,  # int32 [num_rows, num_chunks, TOP]
    chunk_raw_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_raw_sum_ptr,  # float32 [num_rows, num_chunks]
    out_ids_ptr,  # int32 [num_rows, TOP]
    out_logprobs_ptr,  # float32 [num_rows, TOP]
    num_chunks,
    CHUNKS: tl.constexpr,
    TOP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_top = _num_top(rows_ptr, row)
    if num_top == 0:
        return
    first = row * num_chunks
    total_log = log_sum_exp(
        chunk_raw_max_ptr + first, chunk_raw_sum_ptr + first, num_chunks, CHUNKS
    )
    at = tl.arange(0, CHUNKS * TOP)  # [CHUNKS * TOP]
    is_candidate = (at % TOP < num_top) & (at < num_chunks * TOP)
    keys = tl.load(top_keys_ptr + first * TOP + at, mask=is_candidate, other=_PICKED)
    i = 0
    while i < num_top:
        # Candidates are in the order of ids where keys are equal, so the first is the lowest id.
        best, index = tl.max(keys, axis=0, return_indices=True)
        logit = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(out_ids_ptr + row * TOP + i, tl.load(top_ids_ptr + first * TOP + index))
        tl.store(out_logprobs_ptr + row * TOP + i, logit - total_log)
        keys = tl.where(at == index, _PICKED, keys)
        i += 1


def top_logprobs(
    logits: Tensor,
    *,
    state: SamplingState,
    workspace: SamplingWorkspace,
    out: SampledRows,
    use_pdl: bool,
) -> None:
    """After `score` with LOGPROBS: the rows' num_top best tokens into `out`."""
    num_rows, vocab_size = logits.shape
    block = workspace.block
    num_chunks = triton.cdiv(vocab_size, block)
    top_keys, top_ids = workspace.chunk_top.unbind(0)
    _, raw_max, raw_sum, *_ = workspace.chunk_floats.unbind(0)
    _chunk_top_kernel[(num_chunks, num_rows)](
        logits,
        state.rows,
        top_keys,
        top_ids,
        logits.stride(0),
        vocab_size,
        BLOCK=block,
        TOP=MAX_TOP_LOGPROBS,
        USE_PDL=use_pdl,
        num_warps=num_warps_of(block),
        launch_pdl=use_pdl,
    )
    _row_top_kernel[(num_rows,)](
        state.rows,
        top_keys,
        top_ids,
        raw_max,
        raw_sum,
        out.top_ids,
        out.top_logprobs,
        num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        TOP=MAX_TOP_LOGPROBS,
        USE_PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
