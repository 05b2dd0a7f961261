"""e4m3 pairs are parted into the values that they hold: all 65,536 pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_inputs import FP8
from kernels.fp8_pairs import even_values, odd_values
from kernels.platform import is_interpreted

NUM_PAIRS = 2**16


@triton.jit
def _part_kernel(
    pairs_ptr,  # [num_pairs] int16
    even_ptr,  # [num_pairs] float16
    odd_ptr,  # [num_pairs] float16
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs = tl.load(pairs_ptr + at)
    tl.store(even_ptr + at, even_values(pairs, INTERPRETED))
    tl.store(odd_ptr + at, odd_values(pairs, INTERPRETED))


def test_every_pair(device: torch.device) -> None:
    pairs = torch.arange(NUM_PAIRS, dtype=torch.int32).to(torch.int16).to(device)
    even, odd = (torch.zeros(NUM_PAIRS, dtype=torch.float16, device=device) for _ in range(2))
    block = 4096
    _part_kernel[(NUM_PAIRS // block,)](
        pairs, even, odd, BLOCK=block, INTERPRETED=is_interpreted(), num_warps=4
    )
    values = pairs.view(FP8).view(-1, 2).to(torch.float16)
    for actual, expected in ((even, values[:, 0]), (odd, values[:, 1])):
        # The interpreter's e4m3 has no NaN, and no pool holds one.
        is_number = ~expected.isnan()
        assert is_number.sum() == NUM_PAIRS // 256 * 254
        assert torch.equal(actual[is_number], expected[is_number])
