"""streamed_gemm against float32 torch on the dequantised weights; it runs on a GPU only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemm_cases import assert_close, full_epilogue, rows_apart
from kernels.int4_packing import pack_int4
from kernels.streamed_gemm import (
    MAX_NUM_ROWS,
    StreamedTile,
    can_stream,
    candidate_streamed_tiles,
    streamed_tile_for,
)
from kernels.weight_only_gemm import weight_only_gemm, weight_only_gemm_reference

BF16 = torch.bfloat16
KINDS = (None, 64, 128)
"""Group sizes; None is int8."""
NUM_ROWS = (1, 2, 3, 5, 8)

# (N, K): tiles and blocks filled and not, K of one block and of many steps.
SHAPES = [(16, 128), (63, 1008), (1000, 4608), (4096, 4096), (4096, 14336), (6144, 2064)]


def _quantised(kind: int | None, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight, scale) of `kind`."""
    if kind is None:
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
        return weight, (torch.rand(n, device=device) + 0.1) / (70 * k**0.5)
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(-(-k // kind), n, device=device) + 0.1) / (5 * k**0.5)
    return pack_int4(q, group_size=kind), scale.to(torch.float16).t()


def _check(
    kind: int | None,
    num_rows: int,
    n: int,
    k: int,
    device: torch.device,
    *,
    swiglu: bool = False,
    tile: StreamedTile | None = None,
) -> None:
    torch.manual_seed(num_rows * n + k)
    epilogue = full_epilogue(num_rows, n, BF16, device, swiglu=swiglu)
    x = rows_apart(num_rows, k, BF16, device)
    weight, scale = _quantised(kind, n * epilogue.rows_per_column, k, device)
    assert can_stream(x, weight, scale, kind)
    operands = {**epilogue._asdict(), "group_size": kind}
    expected = weight_only_gemm_reference(x, weight, scale, **operands)
    runs = [weight_only_gemm(x, weight, scale, tile=tile, **operands) for _ in range(2)]
    assert_close(runs[0], expected)
    assert torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_table_leads_the_candidates(kind: int | None) -> None:
    for num_rows in NUM_ROWS:
        for n, k in SHAPES:
            tiles = candidate_streamed_tiles(num_rows, n, k, group_size=kind)
            assert tiles[0] == streamed_tile_for(num_rows, n, k, group_size=kind)
            assert len(set(tiles)) == len(tiles)


def test_what_it_does_not_serve_goes_elsewhere(device: torch.device) -> None:
    weight, scale = _quantised(None, 32, 256, device)
    x = torch.randn(MAX_NUM_ROWS + 1, 256, device=device).to(BF16)
    assert not can_stream(x, weight, scale, None)
    assert not can_stream(x[:1].float(), weight, scale, None)
    assert not can_stream(x[:1, 1:], weight[:, 1:], scale, None)
    packed, scales = _quantised(32, 32, 256, device)
    assert not can_stream(x[:1], packed, scales, 32)
    wide = torch.empty(2, 40_000, dtype=torch.int8, device=device)
    assert not can_stream(x.new_empty(1, 40_000), wide, scale[:2], None)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("swiglu", [False, True])
def test_grid_of_shapes(
    num_rows: int, kind: int | None, swiglu: bool, device: torch.device
) -> None:
    for n, k in SHAPES:
        _check(kind, num_rows, n, k, device, swiglu=swiglu)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 8])
def test_candidate_tiles_agree(num_rows: int, kind: int | None, device: torch.device) -> None:
    for tile in candidate_streamed_tiles(num_rows, 1000, 4096, group_size=kind)[::5]:
        _check(kind, num_rows, 1000, 4096, device, swiglu=True, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, BF16, torch.float32])
def test_scale_dtypes(kind: int | None, scale_dtype: torch.dtype, device: torch.device) -> None:
    weight, scale = _quantised(kind, 48, 1024, device)
    scale = scale.to(scale_dtype)
    x = torch.randn(2, 1024, device=device).to(BF16)
    for scales in (scale, scale.contiguous()):
        expected = weight_only_gemm_reference(x, weight, scales, group_size=kind)
        assert_close(weight_only_gemm(x, weight, scales, group_size=kind), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_multiplied_exactly(kind: int | None, device: torch.device) -> None:
    lowest, count = (-128, 256) if kind is None else (-8, 16)
    numbers = torch.arange(lowest, lowest + count, device=device).to(torch.int8)
    q = numbers[:, None].repeat(1, 512).contiguous()
    weight = q if kind is None else pack_int4(q, group_size=kind)
    scale = torch.ones(count, device=device)
    if kind is not None:
        scale = scale[:, None].repeat(1, 512 // kind)
    for k in (0, 1, 63, 64, 129, 255, 256, 511):
        x = torch.zeros(1, 512, dtype=BF16, device=device)
        x[0, k] = 0.75
        y = weight_only_gemm(x, weight, scale, group_size=kind)
        assert torch.equal(y[0], (0.75 * numbers.float()).to(BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [2, 4])
def test_large_values_beside_small_ones(
    num_rows: int, kind: int | None, device: torch.device
) -> None:
    """Products and sums are float32's over the whole range of bfloat16."""
    torch.manual_seed(0)
    weight, scale = _quantised(kind, 64, 4096, device)
    x = torch.randn(num_rows, 4096, device=device)
    x *= torch.logspace(-30, 30, 16, device=device).repeat_interleave(256)
    x[:, 300] = 3e4
    x = x.to(BF16)
    x[-1] = 0
    actual = weight_only_gemm(x, weight, scale, group_size=kind)
    expected = weight_only_gemm_reference(x, weight, scale, group_size=kind)
    error = (actual.float() - expected.float()).norm(dim=-1)
    assert bool((error[:-1] <= 4e-3 * expected.float().norm(dim=-1)[:-1]).all())
    assert bool((actual[-1] == 0).all())
    first = slice(256, 512)
    alone = torch.zeros_like(x)
    alone[:, first] = x[:, first]
    actual = weight_only_gemm(alone, weight, scale, group_size=kind).float()
    expected = weight_only_gemm_reference(alone, weight, scale, group_size=kind).float()
    assert bool(((actual - expected).norm(dim=-1) <= 4e-3 * expected.norm(dim=-1)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_touch_the_others(
    value: float, device: torch.device
) -> None:
    weight, scale = _quantised(None, 40, 512, device)
    x = torch.randn(2, 512, device=device).to(BF16)
    x[1, 77] = value
    y = weight_only_gemm(x, weight, scale)
    assert_close(y[:1], weight_only_gemm_reference(x[:1], weight, scale))
    assert not bool(y[1].isfinite().any())


@pytest.mark.gpu
def test_residual_may_be_the_output(device: torch.device) -> None:
    weight, scale = _quantised(64, 4096, 4096, device)
    x = torch.randn(1, 4096, device=device).to(BF16)
    out = torch.randn(1, 4096, device=device).to(BF16)
    expected = weight_only_gemm_reference(x, weight, scale, group_size=64, residual=out)
    assert weight_only_gemm(x, weight, scale, group_size=64, residual=out, out=out) is out
    assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 8])
def test_dependent_launches_in_a_graph(
    num_rows: int, kind: int | None, device: torch.device
) -> None:
    x = torch.randn(num_rows, 4096, device=device).to(BF16)
    layers = [_quantised(kind, 4096, 4096, device) for _ in range(4)]

    def run(launch_pdl: bool) -> Tensor:
        y = x
        for weight, scale in layers:
            y = weight_only_gemm(
                y, weight, scale, group_size=kind, rms_eps=1e-5, launch_pdl=launch_pdl
            )
        return y

    expected = run(launch_pdl=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(launch_pdl=True)
    for _ in range(20):
        graph.replay()
    assert torch.equal(y, expected)
