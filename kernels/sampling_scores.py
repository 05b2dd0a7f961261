"""First pass over the logits: adjustments, the best token and the softmax sum of every chunk.

    score = logit, for a stop token before min_tokens the lowest float32
    score = score + bias
    score = (score / repetition if score > 0 else score * repetition)
            - (frequency * count + presence * [count > 0])          tokens of prompt or output
    score = -inf                                                    outside the allowed tokens
    with GUMBEL: score = score / temperature - log(-log(u(random, token)))

logits [num_rows, vocab_size] in bfloat16, float16 or float32. Rows with ADJUSTS leave their scores
in the workspace as float32; other rows are read again where they are. Counts are dense, bias and
stop tokens a list per slot: after the dense part a listed token's score is computed anew.

Bytes: vocab_size * itemsize a row, and 8 (counts, scores) + 1/8 (allowed) a token with ADJUSTS.
Bound: copy bandwidth; with few rows the latency of one chunk.
Source: the penalties are those of Keskar et al., "CTRL", 2019, section 4.1 (repetition) and of the
OpenAI API (frequency, presence); noise as in Gumbel, "Statistical Theory of Extreme Values", 1954.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sampling_rows import (
    FREQUENCY_PENALTY,
    NUM_BINS,
    NUM_EDITS,
    PRESENCE_PENALTY,
    PROMPT_BIT,
    RANDOM_I64,
    REPETITION_PENALTY,
    SLOT,
    STOP_BIT,
    TEMPERATURE,
    WORDS,
    RowFlag,
    SamplingPath,
    SamplingState,
    SamplingWorkspace,
    load_logits,
    num_warps_of,
    row_flags,
    row_float,
)

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_HIGHEST = tl.constexpr(3.4028234663852886e38)
_FINITE = tl.constexpr(1e30)
_PROMPT_BIT = tl.constexpr(PROMPT_BIT)
_STOP_BIT = tl.constexpr(STOP_BIT)
_ADJUSTS = tl.constexpr(int(RowFlag.ADJUSTS))
_COUNTS = tl.constexpr(int(RowFlag.COUNTS))
_MASKS_STOPS = tl.constexpr(int(RowFlag.MASKS_STOPS))
_GRAMMAR = tl.constexpr(int(RowFlag.GRAMMAR))
_FILTERS = tl.constexpr(int(RowFlag.FILTERS))
_LOGPROBS = tl.constexpr(int(RowFlag.LOGPROBS))
_GUMBEL = tl.constexpr(int(RowFlag.GUMBEL))
_EDIT_BLOCK = 256


@triton.jit
def _restrict(
    x,
    columns,
    mask,
    rows_ptr,
    row,
    counts_ptr,  # [vocab_size] of the row's slot
    allowed_ptr,  # [ceil(vocab_size / 32)] of the row
    flags,
):
    """Penalties and allowed tokens for scores x of `columns`."""
    if flags & _COUNTS != 0:
        seen = tl.load(counts_ptr + columns, mask=mask, other=0)
        count = (seen & (_PROMPT_BIT - 1)).to(tl.float32)
        repetition = row_float(rows_ptr, row, REPETITION_PENALTY)
        frequency = row_float(rows_ptr, row, FREQUENCY_PENALTY)
        presence = row_float(rows_ptr, row, PRESENCE_PENALTY)
        # Rounded as on CPUs: true division, and no multiplication merged with an addition.
        y = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        y -= frequency * count + tl.where(count > 0, presence, 0.0)
        y = tl.minimum(tl.maximum(y, _LOWEST), _HIGHEST)
        x = tl.where(seen != 0, y, x)
    if flags & _GRAMMAR != 0:
        words = tl.load(allowed_ptr + columns // 32, mask=mask, other=0)
        x = tl.where((words >> (columns % 32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def _score_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    rows_ptr,  # int32 [num_rows, WORDS]
    rows_i64_ptr,  # int64 [num_rows, WORDS / 2], the same memory
    counts_ptr,  # int32 [num_slots, vocab_size]
    edit_tokens_ptr,  # int32 [num_slots, max_edits]
    edit_biases_ptr,  # float32 [num_slots, max_edits]
    allowed_ptr,  # int32 [num_rows, allowed_stride]
    scores_ptr,  # int32 [num_rows, scores_stride]
    chunk_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_argmax_ptr,  # int32 [num_rows, num_chunks]
    chunk_raw_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_raw_sum_ptr,  # float32 [num_rows, num_chunks]
    chunk_sum_ptr,  # float32 [num_rows, num_chunks]
    chunk_count_ptr,  # float32 [num_rows, num_chunks]
    histogram_ptr,  # int32 [num_rows, BINS]
    num_candidates_ptr,  # int32 [num_rows]
    weight_above_ptr,  # int64 [num_rows]
    logits_stride: tl.int64,
    scores_stride: tl.int64,
    allowed_stride: tl.int64,
    max_edits: tl.int64,
    vocab_size,
    IS_FULL: tl.constexpr,
    GUMBEL: tl.constexpr,
    BLOCK: tl.constexpr,
    EDIT_BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(rows_ptr + row * WORDS + SLOT).to(tl.int64)
    flags = row_flags(rows_ptr, row)
    if slot < 0:
        return
    out = row * tl.num_programs(0) + chunk
    logits_ptr += row * logits_stride
    columns = chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < vocab_size
    x = load_logits(logits_ptr, columns, inside)  # [BLOCK] float32
    if IS_FULL and flags & _LOGPROBS != 0:
        raw_max = tl.max(x, axis=0)
        # A chunk of impossible tokens has an empty sum, not exp(-inf + inf).
        anchor = tl.where(raw_max > float("-inf"), raw_max, 0.0)
        tl.store(chunk_raw_max_ptr + out, raw_max)
        tl.store(chunk_raw_sum_ptr + out, tl.sum(tl.exp(x - anchor), axis=0))
    if IS_FULL and flags & _ADJUSTS != 0:
        counts_ptr += slot * vocab_size
        allowed_ptr += row * allowed_stride
        scores_ptr += row * scores_stride
        x = _restrict(x, columns, inside, rows_ptr, row, counts_ptr, allowed_ptr, flags)
        tl.store(scores_ptr + columns, x.to(tl.int32, bitcast=True), mask=inside)
        num_edits = tl.load(rows_ptr + row * WORDS + NUM_EDITS)
        # Listed tokens overwrite what other threads of this program have just stored.
        tl.debug_barrier()
        first = 0
        while first < num_edits:
            edits = first + tl.arange(0, EDIT_BLOCK)  # [EDIT_BLOCK]
            listed = edits < num_edits
            tagged = tl.load(edit_tokens_ptr + slot * max_edits + edits, mask=listed, other=0)
            bias = tl.load(edit_biases_ptr + slot * max_edits + edits, mask=listed, other=0.0)
            token = tagged & (_STOP_BIT - 1)
            here = listed & (token >= chunk * BLOCK) & (token < chunk * BLOCK + BLOCK)
            y = load_logits(logits_ptr, token, here)  # [EDIT_BLOCK] float32
            is_masked = (tagged & _STOP_BIT != 0) & (flags & _MASKS_STOPS != 0)
            y = tl.where(is_masked, _LOWEST, y) + bias
            y = _restrict(y, token, here, rows_ptr, row, counts_ptr, allowed_ptr, flags)
            tl.store(scores_ptr + token, y.to(tl.int32, bitcast=True), mask=here)
            first += EDIT_BLOCK
        tl.debug_barrier()
        bits = tl.load(scores_ptr + columns, mask=inside, other=0)
        x = tl.where(inside, bits.to(tl.float32, bitcast=True), float("-inf"))
    if GUMBEL and flags & _GUMBEL != 0:
        seed = tl.load(rows_i64_ptr + row * (WORDS // 2) + RANDOM_I64)
        u = tl.maximum(tl.rand(seed, columns), 1e-10)
        x = tl.div_rn(x, row_float(rows_ptr, row, TEMPERATURE)) - tl.log(-tl.log(u))
    best, index = tl.max(x, axis=0, return_indices=True)
    tl.store(chunk_max_ptr + out, best)
    tl.store(chunk_argmax_ptr + out, chunk * BLOCK + index)
    if IS_FULL and flags & _FILTERS != 0:
        # Masked tokens say nothing about where the others lie.
        is_finite = tl.abs(x) < _FINITE
        tl.store(chunk_sum_ptr + out, tl.sum(tl.where(is_finite, x, 0.0), axis=0))
        tl.store(chunk_count_ptr + out, tl.sum(is_finite.to(tl.float32), axis=0))
        if chunk == 0:
            bins = tl.arange(0, BINS)
            tl.store(histogram_ptr + row * BINS + bins, tl.zeros((BINS,), tl.int32))
            tl.store(num_candidates_ptr + row, 0)
            tl.store(weight_above_ptr + row, tl.zeros((), tl.int64))


def score(
    logits: Tensor,
    *,
    state: SamplingState,
    workspace: SamplingWorkspace,
    path: SamplingPath,
    use_pdl: bool,
) -> None:
    """Fill the workspace's chunk statistics for logits [num_rows, vocab_size]."""
    num_rows, vocab_size = logits.shape
    block, rows = workspace.block, state.rows
    chunk_max, raw_max, raw_sum, sums, counts = workspace.chunk_floats.unbind(0)
    _score_kernel[(triton.cdiv(vocab_size, block), num_rows)](
        logits,
        rows,
        rows.view(torch.int64),
        state.token_counts,
        state.edit_tokens,
        state.edit_biases,
        state.allowed_tokens,
        workspace.scores,
        chunk_max,
        workspace.chunk_argmax,
        raw_max,
        raw_sum,
        sums,
        counts,
        workspace.histogram,
        workspace.num_candidates,
        workspace.weight_above,
        logits.stride(0),
        workspace.scores.stride(0),
        state.allowed_tokens.stride(0),
        state.edit_tokens.stride(0),
        vocab_size,
        IS_FULL=path.is_full,
        GUMBEL=path.gumbel,
        BLOCK=block,
        EDIT_BLOCK=_EDIT_BLOCK,
        BINS=NUM_BINS,
        USE_PDL=use_pdl,
        num_warps=num_warps_of(block),
        launch_pdl=use_pdl,
        enable_fp_fusion=False,
    )
