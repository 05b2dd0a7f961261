from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.block_copy import (
    copy_blocks,
    copy_blocks_reference,
    gather_blocks,
    scatter_blocks,
)

FP8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float32, FP8]


def make_pool(
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_kv_heads: int = 4,
    block_size: int = 16,
    head_dim: int = 64,
    seed: int = 0,
) -> Tensor:
    """Random bytes, NaN patterns among them: contents must not matter."""
    shape = (num_blocks, num_kv_heads, 2, 2, block_size, head_dim)
    generator = torch.Generator(device).manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return raw.random_(generator=generator).view(dtype).view(shape)


def as_bytes(pool: Tensor) -> Tensor:
    return pool.contiguous().view(torch.uint8)


def ids_of(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_copy_between_pools_equals_the_reference(
    dtype: torch.dtype, id_dtype: torch.dtype, device: torch.device
) -> None:
    src = make_pool(5, dtype, device)
    dst = make_pool(7, dtype, device, seed=1)
    expected = dst.clone()
    src_ids = ids_of([4, 0, -1, 2, 1], device, id_dtype)
    dst_ids = ids_of([0, 6, 3, -1, 5], device, id_dtype)
    copy_blocks_reference(src, expected, src_ids=src_ids, dst_ids=dst_ids)
    untouched = as_bytes(dst[1:5]).clone()
    copy_blocks(src, dst, src_ids=src_ids, dst_ids=dst_ids)
    assert torch.equal(as_bytes(dst), as_bytes(expected))
    assert torch.equal(as_bytes(dst[0]), as_bytes(src[4]))
    assert torch.equal(as_bytes(dst[1:5]), untouched)


def test_copy_within_a_pool(device: torch.device) -> None:
    pool = make_pool(6, torch.bfloat16, device)
    before = pool.clone()
    copy_blocks(pool, pool, src_ids=ids_of([0, 1], device), dst_ids=ids_of([5, 2], device))
    order = [0, 1, 1, 3, 4, 0]
    assert torch.equal(as_bytes(pool), as_bytes(before[order]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_then_scatter_restores_the_blocks(dtype: torch.dtype, device: torch.device) -> None:
    pool = make_pool(6, dtype, device)
    before = as_bytes(pool).clone()
    ids = ids_of([3, 5, 0], device)
    staging = gather_blocks(pool, ids)
    assert staging.is_contiguous()
    assert torch.equal(as_bytes(staging), before[ids])
    as_bytes(pool)[ids] = 0
    scatter_blocks(staging, pool, ids)
    assert torch.equal(as_bytes(pool), before)


def test_gather_leaves_rows_of_negative_ids(device: torch.device) -> None:
    pool = make_pool(3, torch.float32, device)
    out = make_pool(3, torch.float32, device, seed=5)
    before = as_bytes(out).clone()
    gather_blocks(pool, ids_of([2, -1, 0], device), out=out)
    assert torch.equal(as_bytes(out)[1], before[1])
    assert torch.equal(as_bytes(out)[[0, 2]], as_bytes(pool)[[2, 0]])


def test_head_ranges_between_pools_of_different_tensor_parallel_sizes(
    device: torch.device,
) -> None:
    """Heads 2..3 of every block of one pool become heads 0..1 of another's blocks."""
    src = make_pool(5, torch.bfloat16, device, num_kv_heads=8)
    dst = make_pool(4, torch.bfloat16, device, num_kv_heads=2, seed=1)
    expected = dst.clone()
    expected[[1, 3]] = src[[4, 2], 2:4]
    copy_blocks(src[:, 2:4], dst, src_ids=ids_of([4, 2], device), dst_ids=ids_of([1, 3], device))
    assert torch.equal(as_bytes(dst), as_bytes(expected))
    staging = gather_blocks(dst[:, 1:2], ids_of([3, 1], device))
    before = as_bytes(src[:, :5]).clone()
    scatter_blocks(staging, src[:, 5:6], ids_of([0, 4], device))
    assert torch.equal(as_bytes(src[[0, 4], 5:6]), as_bytes(expected[[3, 1], 1:2]))
    assert torch.equal(as_bytes(src[:, :5]), before)


@pytest.mark.parametrize("max_programs", [1, 3, 1000])
def test_programs_share_all_tiles(max_programs: int, device: torch.device) -> None:
    """A block of 128 KiB has eight tiles; any number of programs moves them all."""
    src = make_pool(3, torch.float32, device, num_kv_heads=8, block_size=16)
    dst = make_pool(3, torch.float32, device, num_kv_heads=8, block_size=16, seed=1)
    src_ids, dst_ids = ids_of([2, 1], device), ids_of([0, 1], device)
    copy_blocks(src, dst, src_ids=src_ids, dst_ids=dst_ids, max_programs=max_programs)
    assert torch.equal(as_bytes(dst)[:2], as_bytes(src)[[2, 1]])


@pytest.mark.parametrize("length", [1, 3, 63, 1000])
def test_blocks_of_odd_lengths_move_bytewise(length: int, device: torch.device) -> None:
    src = torch.arange(5 * length, dtype=torch.int64, device=device).to(torch.uint8).view(5, -1)
    dst = torch.zeros(4, length + 3, dtype=torch.uint8, device=device)
    copy_blocks(src, dst[:, 1 : length + 1], src_ids=ids_of([4, 0, 1, 2], device))
    assert torch.equal(dst[:, 1 : length + 1], src[[4, 0, 1, 2]])
    assert not dst[:, 0].any() and not dst[:, length + 1 :].any()


def test_no_entries(device: torch.device) -> None:
    pool = make_pool(2, torch.bfloat16, device)
    before = pool.clone()
    none = ids_of([], device)
    copy_blocks(pool, pool, src_ids=none, dst_ids=none)
    assert gather_blocks(pool, none).shape == (0, *pool.shape[1:])
    assert torch.equal(as_bytes(pool), as_bytes(before))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_copy_on_a_full_grid(
    head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    shape = {"num_kv_heads": 8, "block_size": block_size, "head_dim": head_dim}
    src = make_pool(60, dtype, device, **shape)
    dst = make_pool(60, dtype, device, **shape, seed=1)
    order = torch.randperm(60, device=device)
    copy_blocks(src, dst, src_ids=order, dst_ids=order.flip(0))
    assert torch.equal(as_bytes(dst)[order.flip(0)], as_bytes(src)[order])


@pytest.mark.gpu
def test_pools_past_2_31_words(device: torch.device) -> None:
    """9 GiB: the last block starts past 2^31 four-byte words."""
    pool = torch.zeros(9, 1 << 28, dtype=torch.int32, device=device)
    pool[8] = 5
    copy_blocks(pool, pool, src_ids=ids_of([8], device), dst_ids=ids_of([1], device))
    assert bool((pool[1] == 5).all()) and not pool[0].any() and not pool[2].any()


@pytest.mark.parametrize(
    ("src", "dst", "ids", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 8), ([0], [0]), "equal ones"),
        (torch.zeros(2, 4), torch.zeros(2, 4).half(), ([0], [0]), "float16"),
        (torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), ([0], [0, 1]), r"\[1, 2\]"),
        (torch.zeros(2, 8)[:, ::2], torch.zeros(2, 4), ([0], [0]), "contiguous blocks"),
        (torch.zeros(2, 4), torch.zeros(2, 4), (None, [0, 1, 1]), "2 blocks for 3"),
        (torch.zeros(2, 4), torch.zeros(2, 4), ([0.0], [0]), "float32"),
    ],
)
def test_what_it_refuses(
    src: Tensor, dst: Tensor, ids: tuple[list[int] | None, list[int]], message: str
) -> None:
    src_ids = None if ids[0] is None else torch.tensor(ids[0])
    with pytest.raises(ValueError, match=message):
        copy_blocks(src, dst, src_ids=src_ids, dst_ids=torch.tensor(ids[1]))


def test_a_limit_of_no_programs_is_refused() -> None:
    pool = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="max_programs is 0"):
        copy_blocks(pool, pool, max_programs=0)
