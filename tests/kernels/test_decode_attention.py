"""Decode attention against its float32 reference: shapes, layouts, options, division of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_inputs import FP8, PagedKv, assert_close, paged_kv, poisoned
from kernels.decode_attention import (
    DecodeTile,
    candidate_tiles,
    decode_attention,
    decode_attention_reference,
    decode_workspace,
)

SMALL = DecodeTile(16, 4, 1, programs_per_sm=1, min_tiles=1)


def _query(num_seqs: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_seqs, num_heads, head_dim, generator=generator).to(dtype)


def _check(
    kv: PagedKv,
    query: Tensor,
    *,
    num_programs: int | None = 5,
    tile: DecodeTile | None = SMALL,
    **options: Any,
) -> Tensor:
    """Runs the kernel into a poisoned buffer, compares it, and looks at what it leaves behind."""
    args = (query, kv.pool, kv.block_tables, kv.seq_lens)
    shape = (query.shape[0], query.shape[1], query.shape[2])
    workspace = decode_workspace(shape, kv.pool, num_programs=num_programs, tile=tile)
    out = poisoned(*shape, dtype=query.dtype, device=query.device)
    lse = poisoned(*shape[:2], device=query.device)
    expected_lse = torch.empty_like(lse)
    decode_attention(
        *args, layer=kv.layer, out=out, lse=lse, workspace=workspace, tile=tile, **options
    )
    expected = decode_attention_reference(*args, layer=kv.layer, lse=expected_lse, **options)
    assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)
    assert not workspace.arrivals.any()
    return out


@pytest.mark.parametrize("head_dim", [16, 18, 64, 80, 96, 128, 192, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    kv = paged_kv([37, 5], num_kv_heads=2, head_dim=head_dim, device=device)
    _check(kv, _query(2, 4, head_dim, torch.float32).to(device), scale=head_dim**-0.5)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 17])
def test_group_sizes(group: int, device: torch.device) -> None:
    kv = paged_kv([37, 20], num_kv_heads=2, head_dim=32, device=device)
    _check(kv, _query(2, 2 * group, 32, torch.float32).to(device), scale=0.2)


@pytest.mark.parametrize("block_size", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("block_n", [16, 64])
def test_block_sizes(block_size: int, block_n: int, device: torch.device) -> None:
    kv = paged_kv([100, 63, 1], num_kv_heads=1, head_dim=32, block_size=block_size, device=device)
    tile = DecodeTile(block_n, 4, 1, programs_per_sm=1, min_tiles=1)
    _check(kv, _query(3, 2, 32, torch.float32).to(device), tile=tile, scale=0.2)


@pytest.mark.parametrize(
    ("query_dtype", "pool_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, FP8),
        (torch.float16, FP8),
        (torch.bfloat16, FP8),
    ],
)
def test_dtypes(query_dtype: torch.dtype, pool_dtype: torch.dtype, device: torch.device) -> None:
    kv = paged_kv([50, 17], num_kv_heads=2, head_dim=64, dtype=pool_dtype, device=device)
    scales: dict[str, Tensor] = {}
    if pool_dtype == FP8:
        scales = {
            "k_scale": torch.tensor([0.5, 1.5], device=device),
            "v_scale": torch.tensor([0.25, 0.75], device=device),
        }
    _check(kv, _query(2, 6, 64, query_dtype).to(device), scale=0.125, **scales)


@pytest.mark.parametrize("head_dim", [16, 18, 80])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 20, "soft_cap": 5.0}], ids=str)
def test_fp8_head_dims(head_dim: int, options: dict[str, Any], device: torch.device) -> None:
    kv = paged_kv([37, 5], num_kv_heads=2, head_dim=head_dim, dtype=FP8, device=device)
    _check(kv, _query(2, 6, head_dim, torch.float16).to(device), scale=head_dim**-0.5, **options)


@pytest.mark.parametrize(("first", "head_dim"), [(1, 32), (0, 17), (2, 30)])
def test_fp8_values_at_any_place(first: int, head_dim: int, device: torch.device) -> None:
    """Two values are read at a time where that is possible; odd places and widths are not."""
    kv = paged_kv([40, 9], num_kv_heads=2, head_dim=40, dtype=FP8, device=device)
    part = kv.pool[..., first : first + head_dim]
    _check(
        PagedKv(part, kv.block_tables, kv.seq_lens, kv.layer),
        _query(2, 4, head_dim, torch.bfloat16).to(device),
        scale=0.2,
    )


@pytest.mark.parametrize("num_programs", [1, 2, 3, 7, 40, 200])
@pytest.mark.parametrize("lengths", [[1], [300], [5, 0, 33, 0], [200, 3, 70, 16, 1]])
def test_any_division_of_the_work(
    num_programs: int, lengths: list[int], device: torch.device
) -> None:
    kv = paged_kv(lengths, num_kv_heads=2, head_dim=16, device=device)
    query = _query(len(lengths), 4, 16, torch.float32).to(device)
    _check(kv, query, num_programs=num_programs, scale=0.3)


def test_small_work_is_not_divided(device: torch.device) -> None:
    kv = paged_kv([60], num_kv_heads=1, head_dim=16, device=device)
    tile = DecodeTile(16, 4, 1, programs_per_sm=1, min_tiles=4)
    query = _query(1, 2, 16, torch.float32).to(device)
    workspace = decode_workspace((1, 2, 16), kv.pool, num_programs=9, tile=tile)
    args = (query, kv.pool, kv.block_tables, kv.seq_lens)
    decode_attention(*args, layer=kv.layer, workspace=workspace, tile=tile)
    assert workspace.partial_lse.isnan().all()


def test_equal_pairs_get_programs_of_their_own(device: torch.device) -> None:
    kv = paged_kv([40] * 5, num_kv_heads=3, head_dim=16, device=device)
    query = _query(5, 6, 16, torch.float32).to(device)
    workspace = decode_workspace((5, 6, 16), kv.pool, num_programs=16, tile=SMALL)
    args = (query, kv.pool, kv.block_tables, kv.seq_lens)
    decode_attention(
        *args, layer=kv.layer, workspace=workspace, tile=replace(SMALL, programs_per_sm=8)
    )
    assert workspace.partial_lse.isnan().all()


@pytest.mark.parametrize("num_seqs", [1, 2, 5, 16, 31, 48, 64, 200])
def test_a_workspace_serves_smaller_batches(num_seqs: int) -> None:
    """Whatever tile the table has for them, the grid finds room for its parts."""
    pool = torch.empty(1, 8, 1, 2, 64, 128, dtype=torch.bfloat16)
    programs_per_sm = candidate_tiles(128, 2, 4, num_seqs * 8)[0].programs_per_sm
    largest = decode_workspace((256, 32, 128), pool).num_programs
    own = decode_workspace((num_seqs, 32, 128), pool, tile=replace(
        SMALL, programs_per_sm=programs_per_sm)).num_programs  # fmt: skip
    assert own <= largest


OPTIONS = [
    {"sliding_window": 1},
    {"sliding_window": 16},
    {"sliding_window": 33},
    {"sliding_window": 1000},
    {"soft_cap": 2.0},
    {"soft_cap": 30.0, "scale": 50.0},
    {"sliding_window": 20, "soft_cap": 5.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], device: torch.device) -> None:
    kv = paged_kv([100, 31, 1], num_kv_heads=2, head_dim=32, device=device)
    query = _query(3, 4, 32, torch.float32).to(device)
    _check(kv, query, **{"scale": 0.3, **options})


@pytest.mark.parametrize("height", [-3.0, 2.0, 200.0, float("-inf")])
def test_sinks(height: float, device: torch.device) -> None:
    kv = paged_kv([100, 31, 0, 1], num_kv_heads=2, head_dim=32, device=device)
    sinks = torch.linspace(0, 2, 4, device=device) + height
    query = _query(4, 4, 32, torch.float32).to(device)
    _check(kv, query, sinks=sinks, scale=0.3, sliding_window=50)


def test_rows_without_context_are_zeros(device: torch.device) -> None:
    kv = paged_kv([0] * 9, num_kv_heads=2, head_dim=20, device=device)
    out = _check(kv, _query(9, 34, 20, torch.float32).to(device), num_programs=2)
    assert out.eq(0).all()


def test_strided_rows(device: torch.device) -> None:
    kv = paged_kv([40, 9], num_kv_heads=2, head_dim=32, device=device)
    fused = _query(2, 4 + 2 * 2, 32, torch.float32).to(device)
    query, out = fused[:, :4], poisoned(2, 9, 64, device=device)[:, 2:6, :32]
    args = (kv.pool, kv.block_tables, kv.seq_lens)
    decode_attention(query, *args, layer=kv.layer, out=out)
    assert_close(out, decode_attention_reference(query, *args, layer=kv.layer))


def test_strided_pool(device: torch.device) -> None:
    kv = paged_kv([40, 9], num_kv_heads=4, head_dim=32, device=device)
    part = PagedKv(kv.pool[:, 1:3], kv.block_tables, kv.seq_lens, kv.layer)
    _check(part, _query(2, 4, 32, torch.float32).to(device), scale=0.2)


def test_two_runs_are_equal(device: torch.device) -> None:
    kv = paged_kv([300, 40], num_kv_heads=2, head_dim=32, dtype=torch.bfloat16, device=device)
    query = _query(2, 4, 32, torch.bfloat16).to(device)
    assert torch.equal(_check(kv, query, num_programs=9), _check(kv, query, num_programs=9))


def test_no_sequences(device: torch.device) -> None:
    kv = paged_kv([], num_kv_heads=2, head_dim=16, device=device)
    query = torch.zeros(0, 4, 16, device=device)
    args = (query, kv.pool, kv.block_tables, kv.seq_lens)
    assert decode_attention(*args, layer=0).shape == (0, 4, 16)


def test_candidates_start_with_the_table() -> None:
    tiles = candidate_tiles(128, 2, 4, 1024)
    assert tiles[0] == DecodeTile(64, 4, 3, 3, 2, 168)
    assert len(tiles) == len(set(tiles)) > 10


def test_refuses_what_it_cannot_compute(device: torch.device) -> None:
    kv = paged_kv([40], num_kv_heads=2, head_dim=16, device=device)
    query = _query(1, 4, 16, torch.float32).to(device)
    tables = (kv.block_tables, kv.seq_lens)

    def refused(match: str, query: Tensor = query, pool: Tensor = kv.pool, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            decode_attention(query, pool, *tables, **{"layer": 0, **options})

    refused("layer 2 is outside 0..1", layer=2)
    refused("need a multiple", query=query[:, :3])
    refused("queries take", query=query.half())
    refused("belong to a", k_scale=torch.ones(2, device=device))
    refused("sinks is", sinks=torch.ones(3, device=device))
    refused("contiguous", query=query.transpose(1, 2).contiguous().transpose(1, 2))
    refused("above 256", query=query.repeat(1, 1, 20), pool=kv.pool.repeat(1, 1, 1, 1, 1, 20))
    small = decode_workspace((1, 2, 16), kv.pool, num_programs=2)
    refused("make it with decode_workspace", workspace=small)
    with pytest.raises(ValueError, match="need one each"):
        decode_attention(query.repeat(2, 1, 1), kv.pool, *tables, layer=0)


LENGTHS: list[Sequence[int]] = [
    [1],
    [63],
    [1000],
    [8191],
    [1, 2, 63, 64, 65, 1000, 4097, 0],
    [*range(1, 257)],
]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}x{max(x)}")
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, FP8])
def test_full_size(
    lengths: list[int], block_size: int, pool_dtype: torch.dtype, device: torch.device
) -> None:
    kv = paged_kv(
        lengths,
        num_kv_heads=8,
        head_dim=128,
        block_size=block_size,
        dtype=pool_dtype,
        device=device,
    )
    query = _query(len(lengths), 32, 128, torch.bfloat16).to(device)
    first = _check(kv, query, num_programs=None, tile=None, scale=128**-0.5)
    again = _check(kv, query, num_programs=None, tile=None, scale=128**-0.5)
    assert torch.equal(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "group"),
    [(64, 1), (80, 4), (96, 7), (128, 16), (192, 4), (256, 1), (128, 1), (128, 7)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8])
def test_shapes_on_the_gpu(
    head_dim: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    kv = paged_kv([1000, 0, 63, 4097], num_kv_heads=2, head_dim=head_dim, block_size=64,
                  dtype=dtype, device=device)  # fmt: skip
    query_dtype = torch.bfloat16 if dtype == FP8 else dtype
    query = _query(4, 2 * group, head_dim, query_dtype).to(device)
    _check(kv, query, num_programs=None, tile=None, scale=head_dim**-0.5)
    _check(kv, query, num_programs=None, tile=None, scale=head_dim**-0.5, sliding_window=77,
           soft_cap=20.0, sinks=torch.ones(2 * group, device=device))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("num_seqs", [1, 3, 16, 17, 33, 40, 50, 64, 67])
def test_every_tile_of_the_table(
    num_seqs: int, pool_dtype: torch.dtype, block_size: int, device: torch.device
) -> None:
    lengths = [1 + 977 * seq % 1500 for seq in range(num_seqs)]
    kv = paged_kv(lengths, num_kv_heads=8, head_dim=128, block_size=block_size, dtype=pool_dtype,
                  device=device)  # fmt: skip
    query = _query(num_seqs, 32, 128, torch.bfloat16).to(device)
    _check(kv, query, num_programs=None, tile=None, scale=0.09)


@pytest.mark.gpu
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, FP8])
def test_every_candidate_tile(pool_dtype: torch.dtype, device: torch.device) -> None:
    kv = paged_kv([3000, 100], num_kv_heads=8, head_dim=128, block_size=64, dtype=pool_dtype,
                  device=device)  # fmt: skip
    query = _query(2, 32, 128, torch.bfloat16).to(device)
    for tile in dict.fromkeys(
        replace(tile, min_tiles=1) for tile in candidate_tiles(128, kv.pool.element_size(), 4, 16)
    ):
        _check(kv, query, num_programs=None, tile=tile, scale=0.09)


@pytest.mark.gpu
def test_blocks_beyond_two_to_the_31_elements(device: torch.device) -> None:
    small = paged_kv([200, 70], num_kv_heads=2, head_dim=128, block_size=64, dtype=torch.bfloat16,
                     num_layers=32, device=device)  # fmt: skip
    per_block = small.pool[0].numel()
    first = 2**31 // per_block + 1
    pool = torch.zeros(first + small.pool.shape[0], *small.pool.shape[1:], dtype=torch.bfloat16,
                       device=device)  # fmt: skip
    pool[first:] = small.pool
    kv = PagedKv(pool, small.block_tables + first, small.seq_lens, small.layer)
    query = _query(2, 8, 128, torch.bfloat16).to(device)
    _check(kv, query, num_programs=None, tile=None, scale=0.09)


@pytest.mark.gpu
def test_one_captured_graph_serves_any_lengths(device: torch.device) -> None:
    kv = paged_kv([2000, 700, 1, 64], num_kv_heads=8, head_dim=128, block_size=64,
                  dtype=torch.bfloat16, device=device)  # fmt: skip
    query = _query(4, 32, 128, torch.bfloat16).to(device)
    lengths, out = kv.seq_lens.clone(), torch.empty_like(query)
    args = (query, kv.pool, kv.block_tables, lengths)
    workspace = decode_workspace((4, 32, 128), kv.pool)
    decode_attention(*args, layer=kv.layer, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pdl in (False, True, True):
            decode_attention(*args, layer=kv.layer, out=out, workspace=workspace, launch_pdl=pdl)
    for new in ([2000, 700, 1, 64], [1, 1, 0, 0], [65, 300, 1, 63], [0, 0, 0, 0]):
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, decode_attention_reference(*args, layer=kv.layer))
        assert not workspace.arrivals.any()
