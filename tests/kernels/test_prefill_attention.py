"""Prefill attention against its float32 reference, and against decode attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_inputs import FP8, PagedKv, assert_close, paged_kv, poisoned
from kernels.decode_attention import decode_attention
from kernels.prefill_attention import prefill_attention, prefill_attention_reference
from kernels.prefill_attention_tile import PrefillTile, candidate_tiles

GATHERED = PrefillTile(32, 32, 4, 1, is_bulk=False)
ONE_BOX = PrefillTile(32, 64, 4, 2)
TWO_BOXES = PrefillTile(32, 128, 4, 2)
SPECIALIZED = PrefillTile(32, 128, 4, 2, is_specialized=True)
BY_NAME = {"gathered": GATHERED, "two boxes": TWO_BOXES, "spec": SPECIALIZED}
TILES = {**BY_NAME, "one box": ONE_BOX}


def _case(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    pool_dtype: torch.dtype | None = None,
    device: torch.device,
    **pool: Any,
) -> tuple[PagedKv, Tensor, Tensor]:
    """A pool, the starts of each sequence's queries, and the queries."""
    kv = paged_kv(
        seq_lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=pool_dtype or dtype,
        device=device,
        **pool,
    )
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(sum(query_lens), num_heads, head_dim, generator=generator)
    return kv, starts.to(device), query.to(dtype).to(device)


def _check(
    kv: PagedKv, starts: Tensor, query: Tensor, *, tile: PrefillTile | None, **options: Any
) -> Tensor:
    """Runs the kernel into poisoned buffers of a few rows more, and compares what is its own."""
    num_rows = query.shape[0]
    padded = torch.cat([query, torch.ones_like(query[:3])])
    out = poisoned(*padded.shape, dtype=query.dtype, device=query.device)
    lse = poisoned(*padded.shape[:2], device=query.device)
    args = (kv.pool, kv.block_tables, starts, kv.seq_lens)
    options = {"scale": query.shape[2] ** -0.5, **options, "layer": kv.layer}
    longest = int(starts.diff().max()) if len(starts) > 1 else 0
    prefill_attention(padded, *args, out=out, lse=lse, tile=tile, max_query_len=longest, **options)
    expected_lse = torch.empty_like(lse[:num_rows])
    expected = prefill_attention_reference(query, *args, lse=expected_lse, **options)
    assert_close(out[:num_rows], expected)
    torch.testing.assert_close(lse[:num_rows], expected_lse, atol=1e-3, rtol=1e-3)
    assert out[num_rows:].isnan().all()
    return out[:num_rows]


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [
        ([1], [1]),
        ([63], [63]),
        ([128], [128]),
        ([200, 3, 70], [70, 3, 0]),
        ([65, 130], [1, 33]),
        ([0, 90, 0], [0, 40, 0]),
    ],
    ids=str,
)
def test_ragged_batches(
    tile: PrefillTile, seq_lens: list[int], query_lens: list[int], device: torch.device
) -> None:
    _check(*_case(seq_lens, query_lens, device=device), tile=tile)


@pytest.mark.parametrize(
    "tile", [GATHERED, TWO_BOXES, SPECIALIZED], ids=["gathered", "two", "spec"]
)
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_head_dims(tile: PrefillTile, head_dim: int, device: torch.device) -> None:
    _check(*_case([100], [40], head_dim=head_dim, device=device), tile=tile)


@pytest.mark.parametrize("block_size", [1, 32, 128])
@pytest.mark.parametrize("tile", [GATHERED, ONE_BOX, SPECIALIZED], ids=["gathered", "box", "spec"])
def test_block_sizes(tile: PrefillTile, block_size: int, device: torch.device) -> None:
    _check(*_case([150, 17], [40, 17], block_size=block_size, device=device), tile=tile)


@pytest.mark.parametrize("group", [1, 3, 4, 16])
@pytest.mark.parametrize("pack", [1, 4])
def test_group_sizes(group: int, pack: int, device: torch.device) -> None:
    if group % pack:
        pytest.skip("only whole packs of a group's heads share a tile")
    case = _case([90, 20], [20, 5], num_heads=2 * group, device=device)
    _check(*case, tile=PrefillTile(32, 64, 4, 1, pack))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("block_size", [16, 64])
def test_dtypes(dtype: torch.dtype, is_fp8: bool, block_size: int, device: torch.device) -> None:
    case = _case([90, 20], [30, 20], dtype=dtype, pool_dtype=FP8 if is_fp8 else dtype,
                 block_size=block_size, device=device)  # fmt: skip
    scales = {"k_scale": [0.5, 1.5], "v_scale": [0.25, 0.75]} if is_fp8 else {}
    _check(*case, tile=None, **{k: torch.tensor(v, device=device) for k, v in scales.items()})


OPTIONS: list[dict[str, Any]] = [
    {"sliding_window": 1},
    {"sliding_window": 20},
    {"sliding_window": 64},
    {"sliding_window": 1000},
    {"soft_cap": 2.0},
    {"soft_cap": 30.0, "scale": 50.0},
    {"sliding_window": 33, "soft_cap": 5.0},
    {"sinks": [0.5, -3.0, 200.0, float("-inf")]},
    {"sinks": [0.0, 1.0, 2.0, 3.0], "sliding_window": 20},
]


@pytest.mark.parametrize(
    "tile", [GATHERED, TWO_BOXES, SPECIALIZED], ids=["gathered", "two", "spec"]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(tile: PrefillTile, options: dict[str, Any], device: torch.device) -> None:
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor(options["sinks"], device=device)}
    _check(*_case([150, 20], [90, 20], device=device), tile=tile, **options)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
def test_one_query_equals_decode(tile: PrefillTile, device: torch.device) -> None:
    lengths = [1, 64, 100]
    kv, starts, query = _case(lengths, [1, 1, 1], device=device)
    args = {"layer": kv.layer, "scale": 0.2}
    decoded = decode_attention(query, kv.pool, kv.block_tables, kv.seq_lens, **args)
    prefilled = prefill_attention(
        query, kv.pool, kv.block_tables, starts, kv.seq_lens, tile=tile, max_query_len=1, **args
    )
    assert_close(prefilled, decoded)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
def test_chunks_equal_the_whole(tile: PrefillTile, device: torch.device) -> None:
    kv, starts, query = _case([130], [130], device=device)
    whole = _check(kv, starts, query, tile=tile)
    for first, last in ((0, 50), (50, 130)):
        kv_part = PagedKv(kv.pool, kv.block_tables, torch.full_like(kv.seq_lens, last), kv.layer)
        bounds = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        part = _check(kv_part, bounds, query[first:last], tile=tile)
        assert_close(part, whole[first:last])


@pytest.mark.parametrize("tile", [GATHERED, SPECIALIZED], ids=["gathered", "spec"])
def test_strided_rows(tile: PrefillTile, device: torch.device) -> None:
    kv, starts, fused = _case([90], [40], num_heads=8, device=device)
    query, out = fused[:, :4], poisoned(40, 9, 64, dtype=fused.dtype, device=device)[:, 2:6, :32]
    args = (query, kv.pool, kv.block_tables, starts, kv.seq_lens)
    prefill_attention(*args, layer=kv.layer, max_query_len=40, out=out, tile=tile)
    assert_close(out, prefill_attention_reference(*args, layer=kv.layer))


def test_pools_that_bulk_copies_cannot_reach(device: torch.device) -> None:
    kv, starts, query = _case([90], [40], num_kv_heads=4, device=device)
    part = PagedKv(kv.pool[:, 1:3], kv.block_tables, kv.seq_lens, kv.layer)
    _check(part, starts, query, tile=SPECIALIZED)
    _check(*_case([90], [40], head_dim=18, device=device), tile=SPECIALIZED)


def test_a_larger_bound_on_query_lens_changes_nothing(device: torch.device) -> None:
    kv, starts, query = _case([90], [40], device=device)
    args = (query, kv.pool, kv.block_tables, starts, kv.seq_lens)
    tight = prefill_attention(*args, layer=kv.layer, max_query_len=40, tile=SPECIALIZED)
    loose = prefill_attention(*args, layer=kv.layer, max_query_len=400, tile=SPECIALIZED)
    assert torch.equal(tight, loose)


def test_two_runs_are_equal(device: torch.device) -> None:
    case = _case([150, 40], [90, 40], device=device)
    assert torch.equal(_check(*case, tile=None), _check(*case, tile=None))


def test_nothing_to_do(device: torch.device) -> None:
    kv, starts, query = _case([5], [0], device=device)
    args = (query, kv.pool, kv.block_tables, starts, kv.seq_lens)
    assert prefill_attention(*args, layer=0, max_query_len=0).shape == (0, 4, 32)


def test_candidates_start_with_the_table() -> None:
    tiles = candidate_tiles(128, 2, 8192, 4)
    assert tiles[0] == PrefillTile(128, 64, 8, 3, is_specialized=True, max_registers=128)
    assert len(tiles) == len(set(tiles)) > 10


def test_refuses_what_it_cannot_compute(device: torch.device) -> None:
    kv, starts, query = _case([40], [10], device=device)

    def refused(match: str, starts: Tensor = starts, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            prefill_attention(
                query, kv.pool, kv.block_tables, starts, kv.seq_lens,
                **{"layer": 0, "max_query_len": 10, **options},
            )  # fmt: skip

    refused("int32", starts=starts.long())
    refused(r"must be \(2,\)", starts=starts[:1])
    refused("above 0", scale=0.0)
    refused("not be negative", max_query_len=-1)
    refused("layer -1", layer=-1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [
        ([1000], [1000]),
        ([4095], [4095]),
        ([4096 + 1024], [1024]),
        ([1, 63, 1000, 2049, 4097, 300], [1, 63, 100, 2049, 7, 0]),
        ([2048] * 4, [2048] * 4),
        ([256, 384], [129, 257]),
    ],
    ids=["1000", "4095", "prefix", "ragged", "4x2048", "a last query that sees whole steps"],
)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, FP8])
def test_full_size(
    seq_lens: list[int],
    query_lens: list[int],
    block_size: int,
    pool_dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = _case(seq_lens, query_lens, num_heads=32, num_kv_heads=8, head_dim=128,
                 block_size=block_size, pool_dtype=pool_dtype, device=device)  # fmt: skip
    first = _check(*case, tile=None)
    assert torch.equal(first, _check(*case, tile=None))
    _check(*case, tile=None, sinks=torch.linspace(-3, 9, 32, device=device))
    _check(*case, tile=None, sliding_window=300, soft_cap=20.0,
           sinks=torch.ones(32, device=device))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "group"),
    [(64, 1), (80, 4), (96, 7), (128, 16), (192, 4), (256, 1), (128, 1), (128, 7)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8])
def test_shapes_on_the_gpu(
    head_dim: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = _case([1000, 0, 63, 700], [500, 0, 63, 10], num_heads=2 * group, head_dim=head_dim,
                 dtype=torch.bfloat16 if dtype == FP8 else dtype, pool_dtype=dtype,
                 device=device)  # fmt: skip
    _check(*case, tile=None)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sequences_that_end_anywhere_in_a_block(
    head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """What lies behind a sequence's end is NaN; many tiles a program, each with few steps."""
    seq_lens = [*range(1, 131, 3), 255, 256, 257, 511, 639, 640, 641]
    query_lens = [min(n, 1 + 37 * i % 300) for i, n in enumerate(seq_lens)]
    case = _case(seq_lens, query_lens, num_heads=8, head_dim=head_dim, block_size=block_size,
                 dtype=dtype, device=device)  # fmt: skip
    first = _check(*case, tile=None)
    assert torch.equal(first, _check(*case, tile=None))


@pytest.mark.gpu
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_every_candidate_tile(
    pool_dtype: torch.dtype, block_size: int, device: torch.device
) -> None:
    case = _case([1500, 100], [1000, 100], num_heads=32, num_kv_heads=8, head_dim=128,
                 block_size=block_size, pool_dtype=pool_dtype, device=device)  # fmt: skip
    for tile in candidate_tiles(128, pool_dtype.itemsize, 1000, 4):
        _check(*case, tile=tile)


@pytest.mark.gpu
def test_blocks_beyond_two_to_the_31_elements(device: torch.device) -> None:
    kv, starts, query = _case([300, 70], [200, 70], num_heads=8, head_dim=128, num_layers=32,
                              device=device)  # fmt: skip
    per_block = kv.pool[0].numel()
    first = 2**31 // per_block + 1
    pool = torch.zeros(first + kv.pool.shape[0], *kv.pool.shape[1:], dtype=torch.bfloat16,
                       device=device)  # fmt: skip
    pool[first:] = kv.pool
    far = PagedKv(pool, kv.block_tables + first, kv.seq_lens, kv.layer)
    for tile in (None, PrefillTile(128, 128, 8, 2), PrefillTile(128, 128, 8, 2, is_bulk=False)):
        _check(far, starts, query, tile=tile)
