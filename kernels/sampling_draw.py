"""Last pass: one token per row, its log-probability, the bookkeeping of its slot.

    greedy:  the first token with the largest score
    draws:   the first token, in vocabulary order, with cumulative weight > random * total weight

random is a 64-bit fraction, so random * total is the high word of a product and below the total:
a draw always ends at a token of positive weight. A row without a possible token takes token 0, or
the last one when it draws, as the CPU sampler does.

The token goes to the row's result, to `last_tokens` at the row's slot (what the next step embeds),
and with COUNTS into the slot's token counts, so a step launched ahead needs nothing from the host.

Bytes: block * 4 a row that draws; else a few cache lines. Bound: latency of one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sampling_rows import (
    DROPPED,
    EVERY_KEY,
    RANDOM_I64,
    SLOT,
    WORDS,
    RowFlag,
    SampledRows,
    SamplingPath,
    SamplingState,
    SamplingWorkspace,
    load_logits,
    log_sum_exp,
    num_warps_of,
    row_flags,
    weight_of,
)

_DRAWS = tl.constexpr(int(RowFlag.DRAWS))
_COUNTS = tl.constexpr(int(RowFlag.COUNTS))
_FILTERS = tl.constexpr(int(RowFlag.FILTERS))
_LOGPROBS = tl.constexpr(int(RowFlag.LOGPROBS))


@triton.jit
def _draw_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    rows_ptr,  # int32 [num_rows, WORDS]
    rows_u64_ptr,  # int64 [num_rows, WORDS / 2], the same memory
    counts_ptr,  # int32 [num_slots, vocab_size]
    keys_ptr,  # int32 [num_rows, keys_stride]
    threshold_ptr,  # int32 [num_rows]
    chunk_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_argmax_ptr,  # int32 [num_rows, num_chunks]
    chunk_weights_ptr,  # int64 [num_rows, num_chunks]
    chunk_raw_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_raw_sum_ptr,  # float32 [num_rows, num_chunks]
    last_tokens_ptr,  # [num_slots]
    token_ids_ptr,  # int64 [num_rows]
    logprobs_ptr,  # float32 [num_rows]
    logits_stride: tl.int64,
    keys_stride: tl.int64,
    vocab_size,
    num_chunks,
    IS_FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(rows_ptr + row * WORDS + SLOT).to(tl.int64)
    flags = row_flags(rows_ptr, row)
    if slot < 0:
        tl.store(token_ids_ptr + row, tl.zeros((), tl.int64))
        return
    chunks = tl.arange(0, CHUNKS)  # [CHUNKS]
    inside = chunks < num_chunks
    at = row * num_chunks + chunks
    maxima = tl.load(chunk_max_ptr + at, mask=inside, other=float("-inf"))
    best, chunk = tl.max(maxima, axis=0, return_indices=True)
    token = tl.load(chunk_argmax_ptr + row * num_chunks + chunk)
    if IS_FULL and flags & _DRAWS != 0:
        threshold = EVERY_KEY
        if flags & _FILTERS != 0:
            threshold = tl.load(threshold_ptr + row)
        sums = tl.cumsum(tl.load(chunk_weights_ptr + at, mask=inside, other=0), axis=0)
        total = tl.max(sums, axis=0)
        random = tl.load(rows_u64_ptr + row * (WORDS // 2) + RANDOM_I64)
        target = tl.umulhi(random.to(tl.uint64, bitcast=True), total.to(tl.uint64)).to(tl.int64)
        chunk = tl.sum((sums <= target).to(tl.int32), axis=0)
        rest = target - tl.max(tl.where(chunks < chunk, sums, 0), axis=0)
        columns = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        key_ptrs = keys_ptr + row * keys_stride + columns
        keys = tl.load(key_ptrs, mask=columns < vocab_size, other=DROPPED)
        cumulative = tl.cumsum(weight_of(keys, threshold), axis=0)
        token = chunk * BLOCK + tl.sum((cumulative <= rest).to(tl.int32), axis=0)
        token = tl.where(best > float("-inf"), token, vocab_size - 1)
    tl.store(token_ids_ptr + row, token.to(tl.int64))
    tl.store(last_tokens_ptr + slot, token.to(last_tokens_ptr.dtype.element_ty))
    if IS_FULL and flags & _COUNTS != 0:
        count_ptr = counts_ptr + slot * vocab_size + token
        tl.store(count_ptr, tl.load(count_ptr) + 1)
    if IS_FULL and flags & _LOGPROBS != 0:
        first = row * num_chunks
        total_log = log_sum_exp(
            chunk_raw_max_ptr + first, chunk_raw_sum_ptr + first, num_chunks, CHUNKS
        )
        logit = load_logits(logits_ptr + row * logits_stride, token, True)
        tl.store(logprobs_ptr + row, logit - total_log)


def draw(
    logits: Tensor,
    *,
    state: SamplingState,
    workspace: SamplingWorkspace,
    path: SamplingPath,
    last_tokens: Tensor,
    out: SampledRows,
    use_pdl: bool,
) -> None:
    """After `score`, and `weigh` where rows draw."""
    num_rows, vocab_size = logits.shape
    block = workspace.block
    num_chunks = triton.cdiv(vocab_size, block)
    chunk_max, raw_max, raw_sum, *_ = workspace.chunk_floats.unbind(0)
    _draw_kernel[(num_rows,)](
        logits,
        state.rows,
        state.rows.view(torch.int64),
        state.token_counts,
        workspace.scores,
        workspace.threshold,
        chunk_max,
        workspace.chunk_argmax,
        workspace.chunk_weights,
        raw_max,
        raw_sum,
        last_tokens,
        out.token_ids,
        out.logprobs,
        logits.stride(0),
        workspace.scores.stride(0),
        vocab_size,
        num_chunks,
        IS_FULL=path.is_full,
        BLOCK=block,
        CHUNKS=triton.next_power_of_2(num_chunks),
        USE_PDL=use_pdl,
        num_warps=num_warps_of(block) if path.is_full else 1,
        launch_pdl=use_pdl,
    )
