"""skinny_gemm against float32 torch."""

from __future__ import annotations

import pytest
import torch

from gemm_cases import assert_close, full_epilogue, poisoned_workspace, rows_apart
from kernels.gemm_launch import GemmWorkspace, Tile
from kernels.skinny_gemm import candidate_tiles, skinny_gemm, skinny_gemm_reference, tile_for

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL_DOT = Tile(16, 32, 32, num_splits=3)

# (M, N, K): N of one column, odd ones, K that no step divides.
SHAPES = [(1, 1, 64), (1, 63, 1000), (2, 40, 130), (3, 100, 257), (17, 63, 300), (33, 1000, 64)]
ALL_NUM_ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 48, 63, 64)


def _check(
    num_rows: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    swiglu: bool = False,
    tile: Tile | None = None,
) -> None:
    torch.manual_seed(num_rows * n + k)
    epilogue = full_epilogue(num_rows, n, dtype, device, swiglu=swiglu)
    x = rows_apart(num_rows, k, dtype, device)
    weight = torch.randn(n * epilogue.rows_per_column, k, device=device).mul_(k**-0.5).to(dtype)
    expected = skinny_gemm_reference(x, weight, **epilogue._asdict())
    assert_close(skinny_gemm(x, weight, tile=tile, **epilogue._asdict()), expected)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_with_norm_bias_and_residual(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    _check(*shape, dtype, device)


@pytest.mark.parametrize("tile", [Tile(4, 4, 64, uses_dot=False), SMALL_DOT])
def test_swiglu(tile: Tile, device: torch.device) -> None:
    _check(3, 37, 200, BF16, device, swiglu=True, tile=tile)


def test_float16(device: torch.device) -> None:
    _check(5, 40, 200, FP16, device)


def test_plain_product_without_an_epilogue(device: torch.device) -> None:
    x, weight = torch.randn(5, 96, device=device), torch.randn(20, 96, device=device)
    assert_close(skinny_gemm(x, weight, tile=SMALL_DOT), x @ weight.T)
    assert_close(skinny_gemm(x[:1], weight), x[:1] @ weight.T)


@pytest.mark.parametrize("tile", [Tile(2, 4, 64, uses_dot=False), SMALL_DOT])
def test_residual_may_be_the_output(tile: Tile, device: torch.device) -> None:
    x, weight = torch.randn(2, 96, device=device), torch.randn(20, 96, device=device)
    out = torch.randn(2, 20, device=device)
    expected = out + x @ weight.T
    assert skinny_gemm(x, weight, residual=out, out=out, tile=tile) is out
    assert_close(out, expected)


def test_split_k_adds_in_order_and_leaves_the_counters_at_zero(device: torch.device) -> None:
    x, weight = torch.randn(17, 256, device=device), torch.randn(70, 256, device=device)
    workspace = poisoned_workspace(device)
    tile = Tile(32, 32, 32, num_splits=4)
    runs = [skinny_gemm(x, weight, rms_eps=1e-6, tile=tile, workspace=workspace) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert int(workspace.counters.abs().sum()) == 0
    assert_close(runs[0], skinny_gemm_reference(x, weight, rms_eps=1e-6))


def test_more_splits_than_steps(device: torch.device) -> None:
    _check(5, 20, 40, FP32, device, tile=Tile(16, 16, 32, num_splits=4))


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    x, weight = torch.randn(1, 300, device=device), torch.randn(50, 300, device=device)
    assert torch.equal(skinny_gemm(x, weight), skinny_gemm(x, weight))


def test_columns_of_a_wider_output(device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(20, 64, device=device)
    wide = torch.full((3, 50), float("nan"), device=device)
    skinny_gemm(x, weight, out=wide[:, 10:30])
    assert_close(wide[:, 10:30], x @ weight.T)
    assert bool(wide[:, :10].isnan().all()) and bool(wide[:, 30:].isnan().all())


def test_no_rows(device: torch.device) -> None:
    x, weight = torch.empty(0, 64, device=device), torch.empty(20, 64, device=device)
    assert skinny_gemm(x, weight, rms_eps=1e-5).shape == (0, 20)


def test_wrong_operands_are_refused_with_the_numbers(device: torch.device) -> None:
    x, weight = torch.randn(2, 64, device=device), torch.randn(21, 64, device=device)
    with pytest.raises(ValueError, match=r"65 rows.*64"):
        skinny_gemm(torch.empty(65, 64, device=device), weight)
    with pytest.raises(ValueError, match=r"weight has shape \(21, 32\).*\(21, 64\)"):
        skinny_gemm(x, weight[:, :32])
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        skinny_gemm(x, weight.half())
    with pytest.raises(ValueError, match="stride 2"):
        skinny_gemm(torch.randn(2, 128, device=device)[:, ::2], weight)
    with pytest.raises(ValueError, match="weight has 21"):
        skinny_gemm(x, weight, swiglu=True)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 20\)"):
        skinny_gemm(x, weight, residual=torch.empty(2, 20, device=device))
    with pytest.raises(ValueError, match=r"10 floats.*needs"):
        workspace = GemmWorkspace.allocate(10, 1, device)
        skinny_gemm(x, weight, tile=SMALL_DOT, workspace=workspace)


@pytest.mark.parametrize("num_rows", ALL_NUM_ROWS)
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (128256, 2048), (1, 16)])
def test_table_fits_every_shape(num_rows: int, n: int, k: int) -> None:
    for itemsize in (2, 4):
        tile = tile_for(num_rows, n, k, itemsize=itemsize)
        assert tile.block_m >= num_rows or itemsize == 4
        tiles = candidate_tiles(num_rows, n, k, itemsize=itemsize)
        assert tiles[0] == tile and len(set(tiles)) == len(tiles)


def test_workspace_covers_the_largest_launch(device: torch.device) -> None:
    launches = [(8, 4096, Tile(8, 64, 64, num_splits=2)), (64, 1000, Tile(64, 128, 64))]
    workspace = GemmWorkspace.for_launches(launches, device)
    assert workspace.parts.numel() == 64 * 2 * (8 * 64 + 8)
    assert workspace.counters.tolist() == [0] * 64


@pytest.mark.gpu
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 17, 33, 64])
def test_grid_of_shapes(num_rows: int, swiglu: bool, device: torch.device) -> None:
    for n, k in [(1, 4096), (63, 1000), (1000, 63), (4096, 4096), (49152, 576)]:
        _check(num_rows, n, k, BF16, device, swiglu=swiglu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("num_rows", [1, 17, 64])
def test_other_dtypes(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    for n, k in [(1000, 63), (6144, 2048)]:
        _check(num_rows, n, k, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 8, 64])
def test_candidate_tiles_agree(num_rows: int, device: torch.device) -> None:
    for tile in candidate_tiles(num_rows, 4096, 4096, itemsize=2)[::9]:
        _check(num_rows, 4096, 4096, BF16, device, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 16, 64])
def test_dependent_launches_in_a_graph(num_rows: int, device: torch.device) -> None:
    x = torch.randn(num_rows, 4096, device=device).to(BF16)
    weight = torch.randn(4096, 4096, device=device).div_(64).to(BF16)
    workspace = GemmWorkspace.allocate(1 << 22, 1 << 10, device)
    expected = x
    for _ in range(8):
        expected = skinny_gemm(expected, weight, rms_eps=1e-5, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(8):
            y = skinny_gemm(y, weight, rms_eps=1e-5, workspace=workspace, launch_pdl=True)
    for _ in range(20):
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_weights_past_two_to_the_31_elements(num_rows: int, device: torch.device) -> None:
    n, k = 600_000, 4096
    x = torch.randn(num_rows, k, device=device).to(BF16)
    weight = torch.empty(n, k, dtype=BF16, device=device).normal_()
    y = skinny_gemm(x, weight)
    last = slice(n - 1000, n)
    assert_close(y[:, last], skinny_gemm_reference(x, weight[last]))
