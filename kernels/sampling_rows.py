"""What the sampling kernels share: the table of row parameters, the state of slots, workspaces.

A row is one line of the logits of a step; a slot belongs to one sequence for as long as it runs.
The host writes one 64-byte record per row (`ROW_DTYPE`) and copies the table once a step; the
kernels read it as int32, float32, int64 or float64 words of the same memory.

Weights of tokens are 64-bit integers, exp(z) in units of 2^-42 of the likeliest token's. Sums of
them are exact, so neither the order of additions nor the number of programs shows in a result.

Not known here: requests, sequences, what a step is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Tokens of one program. The same for every batch size, so that sums in float32 are the same."""
MAX_TOP_LOGPROBS = 32
MAX_VOCAB_SIZE = 1 << 20
"""20 bits of tokens and 42 of weight leave the sign of an int64 free."""
CANDIDATE_CAPACITY = 16384
NUM_BINS = 256
"""Cost of a histogram grows with it: each of 32 lanes keeps count of a 32nd of the bins."""

PROMPT_BIT = 1 << 30
"""In `token_counts`: the token is in the prompt. The bits below count outputs."""
STOP_BIT = 1 << 30
"""In `edit_tokens`: a stop token. The bits below are its id."""

ROW_DTYPE = np.dtype(
    [
        ("slot", "<i4"),
        ("flags", "<i4"),
        ("temperature", "<f4"),
        ("min_p_distance", "<f4"),
        ("top_k", "<i4"),
        ("repetition_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("random", "<u8"),
        ("top_p", "<f8"),
        ("num_edits", "<i4"),
        ("num_top", "<i4"),
        ("reserved", "<i4", (2,)),
    ]
)
"""One row. slot: -1 for a row that pads a captured batch. min_p_distance: -log(min_p), the largest
distance to the best logit. random: 53 random bits at the top of 64. num_top: alternatives wanted.
"""
ROW_WORDS = ROW_DTYPE.itemsize // 4


class RowFlag(IntFlag):
    DRAWS = 1
    """Draws from the distribution; without it the likeliest token is taken."""
    ADJUSTS = 2
    """Some of the next three applies."""
    COUNTS = 4
    """Has penalties, so its tokens are counted."""
    MASKS_STOPS = 8
    """Fewer tokens than min_tokens so far."""
    GRAMMAR = 16
    """Tokens outside `allowed_tokens` are impossible."""
    FILTERS = 32
    """top_k or top_p below their neutral values."""
    LOGPROBS = 64
    GUMBEL = 128
    """Largest logit / temperature + Gumbel noise, instead of DRAWS."""


class SamplingPath(NamedTuple):
    """Which kernels a step launches: what a captured graph is made for.

    A longer path than a step needs gives the same tokens.
    """

    is_full: bool
    """False: every row takes the best of its raw logits, and nothing more is wanted."""
    draws: bool = False
    filters: bool = False
    gumbel: bool = False
    top_logprobs: bool = False

    @classmethod
    def of(cls, flags: int, max_num_top: int) -> SamplingPath:
        """The shortest one, from the union of the rows' flags and the largest num_top."""
        return cls(
            is_full=flags != 0,
            draws=bool(flags & RowFlag.DRAWS),
            filters=bool(flags & RowFlag.FILTERS),
            gumbel=bool(flags & RowFlag.GUMBEL),
            top_logprobs=max_num_top > 0,
        )


@dataclass(frozen=True, slots=True)
class SamplingState:
    """Device memory that outlives a step."""

    rows: Tensor
    """int32 [max_rows, ROW_WORDS]: ROW_DTYPE records."""
    token_counts: Tensor
    """int32 [num_slots, vocab_size]: outputs counted, and PROMPT_BIT."""
    edit_tokens: Tensor
    """int32 [num_slots, max_edits]: distinct biased and stop tokens, with STOP_BIT."""
    edit_biases: Tensor
    """float32 [num_slots, max_edits]"""
    allowed_tokens: Tensor
    """int32 [max_rows, ceil(vocab_size / 32)]: bit i of word j allows token 32 * j + i."""

    @classmethod
    def allocate(
        cls, vocab_size: int, max_rows: int, num_slots: int, max_edits: int, device: torch.device
    ) -> SamplingState:
        """Raises ValueError for a vocabulary beyond MAX_VOCAB_SIZE."""
        if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size is {vocab_size}; sampling takes 1..{MAX_VOCAB_SIZE}")

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            rows=zeros(max_rows, ROW_WORDS),
            token_counts=zeros(num_slots, vocab_size),
            edit_tokens=zeros(num_slots, max_edits),
            edit_biases=zeros(num_slots, max_edits, dtype=torch.float32),
            allowed_tokens=zeros(max_rows, -(-vocab_size // 32)),
        )


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """Scratch memory of a step; its contents before and after do not matter."""

    scores: Tensor
    """int32 [max_rows, vocab_size + CANDIDATE_CAPACITY]: a row's adjusted logits (float32 bits),
    then its keys; after them the candidates for its threshold."""
    chunk_floats: Tensor
    """float32 [5, max_rows, num_chunks]: largest score, largest raw logit, exp-sum of the raw
    logits, sum and number of finite scores."""
    chunk_argmax: Tensor
    """int32 [max_rows, num_chunks]"""
    chunk_weights: Tensor
    """int64 [max_rows, num_chunks]"""
    histogram: Tensor
    """int32 [max_rows, NUM_BINS]"""
    bin_scale: Tensor
    """float32 [max_rows]: bins per unit of distance."""
    num_candidates: Tensor
    """int32 [max_rows]"""
    weight_above: Tensor
    """int64 [max_rows]: of the tokens before the candidates."""
    threshold: Tensor
    """int32 [max_rows]: the largest key that stays."""
    chunk_top: Tensor
    """int32 [2, max_rows, num_chunks, MAX_TOP_LOGPROBS]: order keys and token ids."""
    block: int
    """Tokens of one chunk."""

    @classmethod
    def allocate(
        cls, vocab_size: int, max_rows: int, device: torch.device, block: int = BLOCK
    ) -> SamplingWorkspace:
        num_chunks = triton.cdiv(vocab_size, block)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        # Rows start at multiples of 16 bytes, which vector loads need.
        width = triton.cdiv(vocab_size, 4) * 4 + CANDIDATE_CAPACITY
        return cls(
            scores=empty(max_rows, width),
            chunk_floats=empty(5, max_rows, num_chunks, dtype=torch.float32),
            chunk_argmax=empty(max_rows, num_chunks),
            chunk_weights=empty(max_rows, num_chunks, dtype=torch.int64),
            histogram=empty(max_rows, NUM_BINS),
            bin_scale=empty(max_rows, dtype=torch.float32),
            num_candidates=empty(max_rows),
            weight_above=empty(max_rows, dtype=torch.int64),
            threshold=empty(max_rows),
            chunk_top=empty(2, max_rows, num_chunks, MAX_TOP_LOGPROBS),
            block=block,
        )


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What a step leaves on the device, one entry per row; rows that pad have token 0."""

    token_ids: Tensor
    """int64 [max_rows]"""
    logprobs: Tensor
    """float32 [max_rows]: log-softmax of the raw logits, of rows with LOGPROBS."""
    top_ids: Tensor
    """int32 [max_rows, MAX_TOP_LOGPROBS]: best first, the first num_top of a row."""
    top_logprobs: Tensor
    """float32 [max_rows, MAX_TOP_LOGPROBS]"""

    @classmethod
    def allocate(cls, max_rows: int, device: torch.device | str) -> SampledRows:
        top = (max_rows, MAX_TOP_LOGPROBS)
        return cls(
            token_ids=torch.zeros(max_rows, dtype=torch.int64, device=device),
            logprobs=torch.zeros(max_rows, dtype=torch.float32, device=device),
            top_ids=torch.zeros(top, dtype=torch.int32, device=device),
            top_logprobs=torch.zeros(top, dtype=torch.float32, device=device),
        )


# Columns of a row's record, in words of the type it is read as.
SLOT: tl.constexpr = tl.constexpr(0)
FLAGS: tl.constexpr = tl.constexpr(1)
TEMPERATURE: tl.constexpr = tl.constexpr(2)
MIN_P_DISTANCE: tl.constexpr = tl.constexpr(3)
TOP_K: tl.constexpr = tl.constexpr(4)
REPETITION_PENALTY: tl.constexpr = tl.constexpr(5)
FREQUENCY_PENALTY: tl.constexpr = tl.constexpr(6)
PRESENCE_PENALTY: tl.constexpr = tl.constexpr(7)
RANDOM_I64: tl.constexpr = tl.constexpr(4)
TOP_P_F64: tl.constexpr = tl.constexpr(5)
NUM_EDITS: tl.constexpr = tl.constexpr(12)
NUM_TOP: tl.constexpr = tl.constexpr(13)
WORDS: tl.constexpr = tl.constexpr(16)

WEIGHT_ONE: tl.constexpr = tl.constexpr(float(1 << 42))
"""Weight of the likeliest token."""
EVERY_KEY: tl.constexpr = tl.constexpr(0x7F800000)
"""Bits of infinity: the largest key, of an impossible token; as a threshold it keeps all keys."""
DROPPED: tl.constexpr = tl.constexpr(0x7FFFFFFF)
"""Key of a token that min_p removed: beyond every key, and no weight."""


@triton.jit
def row_flags(rows_ptr, row):
    """Flags of a row; none for a row that pads."""
    slot = tl.load(rows_ptr + row * WORDS + SLOT)
    return tl.where(slot < 0, 0, tl.load(rows_ptr + row * WORDS + FLAGS))


@triton.jit
def row_float(rows_ptr, row, COLUMN: tl.constexpr):
    return tl.load(rows_ptr + row * WORDS + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(logits_ptr, columns, mask):
    """float32 logits. One that is no number counts as impossible."""
    x = tl.load(logits_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def weight_of(keys, threshold):
    """int64 weights: keys are the bits of distances to the best score, in units of temperature."""
    kept = tl.where(keys <= threshold, keys, EVERY_KEY)
    return (tl.exp(-kept.to(tl.float32, bitcast=True)) * WEIGHT_ONE).to(tl.int64)


@triton.jit
def bin_of(keys, scale, BINS: tl.constexpr):
    """Bins of equal width from the best score on, the last one open; DROPPED is in none."""
    distances = tl.minimum(keys, EVERY_KEY).to(tl.float32, bitcast=True)
    bins = tl.minimum(distances * scale, BINS - 1).to(tl.int32)
    return tl.where(keys == DROPPED, BINS, bins)


@triton.jit
def log_sum_exp(chunk_max_ptr, chunk_sum_ptr, num_chunks, CHUNKS: tl.constexpr):
    """Of a row, from its chunks' largest logits and sums of exp(logit - largest)."""
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    largest = tl.load(chunk_max_ptr + chunks, mask=inside, other=float("-inf"))
    sums = tl.load(chunk_sum_ptr + chunks, mask=inside, other=0.0)
    top = tl.max(largest, axis=0)
    scaled = tl.where(largest > float("-inf"), sums * tl.exp(largest - top), 0.0)
    return top + tl.log(tl.sum(scaled, axis=0))


def num_warps_of(block: int) -> int:
    """16 tokens a thread: two 16-byte loads of bfloat16 and, as int64 weights, 32 registers."""
    return min(max(block // 512, 1), 16)
