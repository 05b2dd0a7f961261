"""What kernel tests feed to kernels: tolerances, poisoned buffers, paged KV pools.

A pool built here is NaN wherever no sequence owns a slot, and its block ids are shuffled, so a
kernel that reads past a sequence or assumes neighbouring blocks gives itself away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Allowed |actual - expected| <= absolute + relative * |expected|."""

    absolute: float
    relative: float


TOLERANCES = {
    # Sums of up to a few thousand products in another order; no rounding in between.
    torch.float32: Tolerance(2e-5, 2e-5),
    # 11 significant bits: operands of the second product and the result are rounded once each.
    torch.float16: Tolerance(1e-3, 2e-3),
    # 8 significant bits, likewise; cancelling sums keep the absolute error of their terms.
    torch.bfloat16: Tolerance(8e-3, 1.6e-2),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """For results of order one, computed from exactly the inputs that the reference gets."""
    return TOLERANCES[dtype]


def assert_close(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """`actual` against a float32 reference, within the tolerance of `actual`'s dtype.

    `scale` widens it where results are larger than order one.
    """
    bound = tolerance(actual.dtype)
    torch.testing.assert_close(
        actual.float(),
        expected.float(),
        atol=bound.absolute * scale,
        rtol=bound.relative * scale,
    )


def poisoned(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """A buffer of NaNs: whatever a kernel leaves unwritten, or reads too far, shows."""
    if dtype == FP8:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class PagedKv:
    """A pool holding the keys and values of some sequences in one layer, scattered."""

    pool: Tensor
    """[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]; NaN where not owned."""
    block_tables: Tensor
    """[num_seqs, max_blocks_per_seq] int32; entries past a sequence's end are out of range."""
    seq_lens: Tensor
    """[num_seqs] int32."""
    layer: int

    def slots(self, seq: int) -> Tensor:
        """[seq_len] int64: where the tokens of one sequence lie."""
        size = self.pool.shape[4]
        positions = torch.arange(int(self.seq_lens[seq]), device=self.pool.device)
        return self.block_tables[seq].long()[positions // size] * size + positions % size


def paged_kv(
    seq_lens: Sequence[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    layer: int = 1,
    num_spare_blocks: int = 3,
    device: torch.device | str = "cpu",
    seed: int = 42,
) -> PagedKv:
    """Random keys and values (standard normal) for `seq_lens`, in blocks of shuffled ids."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(counts) + num_spare_blocks
    pool = poisoned(num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim, dtype=dtype)
    ids = torch.randperm(num_blocks, generator=generator).tolist()
    # A kernel that follows an entry past the end faults, or lands in NaNs under the interpreter.
    tables = torch.full((len(counts), max([*counts, 1]) + 1), 2**30, dtype=torch.int32)
    for seq, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        for index in range(count):
            block = ids.pop()
            tables[seq, index] = block
            used = min(block_size, length - index * block_size)
            shape = (num_kv_heads, 2, used, head_dim)
            values = torch.randn(shape, generator=generator)
            pool[block, :, layer, :, :used] = values.to(dtype)
    return PagedKv(
        pool.to(device),
        tables.to(device),
        torch.tensor(list(seq_lens), dtype=torch.int32, device=device),
        layer,
    )
