"""Fused decode attention: equal to rope_kv_write and decode_attention one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_inputs import FP8, PagedKv, assert_close, paged_kv, poisoned
from kernels.decode_attention import DecodeTile, decode_workspace
from kernels.fused_decode_attention import (
    fused_decode_attention,
    fused_decode_attention_reference,
)

SMALL = DecodeTile(16, 4, 1, programs_per_sm=1, min_tiles=1)


def _angles(num_positions: int, head_dim: int) -> Tensor:
    frequencies = 100.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    angles = torch.outer(torch.arange(num_positions), frequencies)
    return torch.cat([angles.cos(), angles.sin()], -1)


def _unfinished(kv: PagedKv) -> tuple[PagedKv, Tensor]:
    """The pool with NaN where each sequence's last token belongs, and the slots of those."""
    pool, size = kv.pool.clone(), kv.pool.shape[4]
    slots = torch.full((len(kv.seq_lens),), -1, dtype=torch.int64)
    for seq, seq_len in enumerate(kv.seq_lens.tolist()):
        if seq_len:
            slots[seq] = kv.slots(seq)[-1]
            block, offset = int(slots[seq]) // size, int(slots[seq]) % size
            hole = pool[block, :, kv.layer, :, offset]
            hole.copy_(poisoned(*hole.shape, dtype=pool.dtype, device=pool.device))
    return PagedKv(pool, kv.block_tables, kv.seq_lens, kv.layer), slots.to(pool.device)


def _check(
    seq_lens: Sequence[int],
    *,
    device: torch.device,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    num_programs: int | None = 5,
    tile: DecodeTile | None = SMALL,
    **options: Any,
) -> Tensor:
    whole = paged_kv(seq_lens, num_kv_heads=num_kv_heads, head_dim=head_dim,
                     block_size=block_size, dtype=pool_dtype or dtype, device=device)  # fmt: skip
    kv, slots = _unfinished(whole)
    expected_pool = kv.pool.clone()
    generator = torch.Generator().manual_seed(3)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(len(seq_lens), width, generator=generator).to(dtype).to(device)
    before = qkv.clone()
    positions = (kv.seq_lens - 1).long()
    cos_sin = _angles(max(*seq_lens, 1) + 1, head_dim).to(device)
    options = {"layer": kv.layer, "num_heads": num_heads, "scale": head_dim**-0.5, **options}
    shape = (len(seq_lens), num_heads, head_dim)
    workspace = decode_workspace(shape, kv.pool, num_programs=num_programs, tile=tile)
    out = poisoned(*shape, dtype=dtype, device=device)
    tables = (kv.block_tables, kv.seq_lens)
    fused_decode_attention(
        qkv, positions, cos_sin, kv.pool, slots, *tables,
        out=out, workspace=workspace, tile=tile, **options,
    )  # fmt: skip
    expected = fused_decode_attention_reference(
        qkv, positions, cos_sin, expected_pool, slots, *tables, **options
    )
    assert_close(out, expected)
    torch.testing.assert_close(
        kv.pool.float(), expected_pool.float(), equal_nan=True, atol=0.01, rtol=0.07
        if pool_dtype == FP8 else 0.01,
    )  # fmt: skip
    assert torch.equal(qkv, before)
    assert not workspace.arrivals.any()
    return out


@pytest.mark.parametrize("num_programs", [1, 3, 8, 60])
@pytest.mark.parametrize("seq_lens", [[1], [2], [17], [300], [5, 0, 33, 0], [200, 3, 64, 16, 1]])
def test_any_division_of_the_work(
    seq_lens: list[int], num_programs: int, device: torch.device
) -> None:
    _check(seq_lens, num_programs=num_programs, device=device)


@pytest.mark.parametrize("head_dim", [16, 18, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_head_shapes(head_dim: int, group: int, device: torch.device) -> None:
    _check([37, 16], head_dim=head_dim, num_heads=2 * group, device=device)


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("block_n", [16, 64])
def test_block_sizes(block_size: int, block_n: int, device: torch.device) -> None:
    tile = DecodeTile(block_n, 4, 1, programs_per_sm=1, min_tiles=1)
    _check([100, 65, 1], block_size=block_size, tile=tile, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_dtypes(dtype: torch.dtype, is_fp8: bool, device: torch.device) -> None:
    names = ("k_scale", "v_scale") if is_fp8 else ()
    scales = {name: torch.tensor([0.02, 0.05], device=device) for name in names}
    _check([50, 17], dtype=dtype, pool_dtype=FP8 if is_fp8 else dtype, device=device, **scales)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 2},
        {"sliding_window": 33},
        {"soft_cap": 2.0},
        {"sliding_window": 17, "soft_cap": 3.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], device: torch.device) -> None:
    _check([100, 33, 17, 16, 1], device=device, **options)


def test_norms_and_sinks(device: torch.device) -> None:
    gains = torch.linspace(0.5, 2, 32, device=device)
    sinks = torch.linspace(-1, 3, 4, device=device)
    _check([100, 33, 0, 1], device=device, q_norm=gains, k_norm=gains.flip(0), sinks=sinks)


def test_two_runs_are_equal(device: torch.device) -> None:
    runs = [_check([300, 40], dtype=torch.bfloat16, device=device) for _ in range(2)]
    assert torch.equal(*runs)


def test_refuses_what_it_cannot_compute(device: torch.device) -> None:
    with pytest.raises(ValueError, match="head_dim 17 is odd"):
        _check([3], head_dim=17, device=device)
    with pytest.raises(ValueError, match="layer 7"):
        _check([3], layer=7, device=device)
    with pytest.raises(ValueError, match="q_norm is"):
        _check([3], q_norm=torch.ones(3, device=device), device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("seq_lens", [[1], [1000], [1, 64, 65, 0, 4097], [*range(1, 257)]], ids=len)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (32, 8, 64)])
def test_full_size(
    seq_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    pool_dtype: torch.dtype,
    block_size: int,
    device: torch.device,
) -> None:
    names = ("k_scale", "v_scale") if pool_dtype == FP8 else ()
    scales = {name: torch.full((num_kv_heads,), 0.03, device=device) for name in names}
    size = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    runs = [
        _check(seq_lens, block_size=block_size, dtype=torch.bfloat16, pool_dtype=pool_dtype,
               num_programs=None, tile=None, device=device, **size, **scales)
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*runs)
