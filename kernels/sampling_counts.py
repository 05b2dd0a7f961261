"""The token counts of a slot, set when a sequence enters it.

    counts[slot, t] = [t in prompt] * PROMPT_BIT + how often t is in the output

token_ids int32 [num_tokens]: prompt followed by output; ids outside the vocabulary do not count.
From then on the kernel that samples counts what it samples.

Bytes: vocab_size * 4 written, num_tokens * 4 read and one atomic each. Runs once a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.platform import runs_triton
from kernels.sampling_rows import PROMPT_BIT

_BLOCK = 1024
_PROMPT_BIT = tl.constexpr(PROMPT_BIT)


def count_tokens_reference(
    token_ids: Tensor, *, slot: int, num_prompt_tokens: int, token_counts: Tensor
) -> None:
    """The same in plain torch."""
    counts = token_counts[slot].zero_()
    is_known = (token_ids >= 0) & (token_ids < counts.shape[0])
    prompt = token_ids[:num_prompt_tokens][is_known[:num_prompt_tokens]].long()
    output = token_ids[num_prompt_tokens:][is_known[num_prompt_tokens:]].long()
    counts[prompt] = PROMPT_BIT
    counts.index_add_(0, output, torch.ones_like(output, dtype=counts.dtype))


@triton.jit(do_not_specialize=["slot", "num_tokens", "num_prompt_tokens"])
def _count_kernel(
    token_ids_ptr,  # int32 [num_tokens]
    counts_ptr,  # int32 [num_slots, vocab_size]
    counts_stride: tl.int64,
    slot,
    num_tokens,
    num_prompt_tokens,
    vocab_size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    token = tl.load(token_ids_ptr + at, mask=at < num_tokens, other=-1)
    is_known = (token >= 0) & (token < vocab_size)
    counts_ptr += slot.to(tl.int64) * counts_stride
    is_prompt = at < num_prompt_tokens
    tl.atomic_or(counts_ptr + token, _PROMPT_BIT, mask=is_known & is_prompt, sem="relaxed")
    tl.atomic_add(counts_ptr + token, 1, mask=is_known & ~is_prompt, sem="relaxed")


def count_tokens(
    token_ids: Tensor, *, slot: int, num_prompt_tokens: int, token_counts: Tensor
) -> None:
    """Replace row `slot` of token_counts, int32 [num_slots, vocab_size].

    Raises ValueError on what the kernel does not take.
    """
    if token_counts.dim() != 2 or token_counts.dtype != torch.int32:
        raise ValueError(
            f"token_counts is {list(token_counts.shape)} {token_counts.dtype}; "
            "give int32 [num_slots, vocab_size]"
        )
    if not 0 <= slot < token_counts.shape[0]:
        raise ValueError(f"slot is {slot}; token_counts has 0..{token_counts.shape[0] - 1}")
    if token_ids.dim() != 1 or token_ids.dtype != torch.int32 or not token_ids.is_contiguous():
        raise ValueError(
            f"token_ids is {list(token_ids.shape)} {token_ids.dtype}; give contiguous int32 [n]"
        )
    if not runs_triton(token_counts):
        count_tokens_reference(
            token_ids, slot=slot, num_prompt_tokens=num_prompt_tokens, token_counts=token_counts
        )
        return
    token_counts[slot].zero_()
    num_tokens = token_ids.shape[0]
    if num_tokens:
        _count_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            token_ids,
            token_counts,
            token_counts.stride(0),
            slot,
            num_tokens,
            num_prompt_tokens,
            token_counts.shape[1],
            BLOCK=_BLOCK,
        )
