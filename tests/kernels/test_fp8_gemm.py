"""fp8_gemm and quantize_fp8_rows against float32 torch."""

from __future__ import annotations

import pytest
import torch

from gemm_cases import assert_close, full_epilogue, poisoned_workspace, rows_apart
from kernels.fp8_gemm import (
    candidate_tiles,
    fp8_gemm,
    fp8_gemm_reference,
    quantize_fp8_rows,
    quantize_fp8_rows_reference,
    tile_for,
)
from kernels.gemm_launch import Tile

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn


def _check(
    num_rows: int,
    n: int,
    k: int,
    device: torch.device,
    *,
    swiglu: bool = False,
    out_dtype: torch.dtype = BF16,
    tile: Tile | None = None,
    fast_accumulation: bool = False,
) -> None:
    torch.manual_seed(num_rows * n + k)
    bias, residual, _, _ = full_epilogue(num_rows, n, out_dtype, device, swiglu=swiglu)
    num_weight_rows = 2 * n if swiglu else n
    x_fp8, x_scale = quantize_fp8_rows(rows_apart(num_rows, k, BF16, device), rms_eps=1e-5)
    weight = torch.randn(num_weight_rows, k, device=device).to(E4M3)
    weight_scale = (torch.rand(num_weight_rows, device=device) + 0.5) / k**0.5
    operands = (x_fp8, x_scale, weight, weight_scale)
    options = {"bias": bias, "residual": residual, "swiglu": swiglu, "out_dtype": out_dtype}
    expected = fp8_gemm_reference(*operands, **options)
    actual = fp8_gemm(*operands, tile=tile, fast_accumulation=fast_accumulation, **options)
    # The tensor cores add products with 14 bits: within a step, or along all of K.
    tolerance = 1e-2 if device.type == "cuda" else 2e-5 if out_dtype == FP32 else 1e-2
    # K / 32 sums, each cut by up to 2^-13 of a value that reaches 2.
    atol = max(tolerance, k / 32 * 2**-12) if fast_accumulation else tolerance
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 1, 64), (3, 63, 300), (33, 70, 256)])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
def test_product_with_scales_bias_and_residual(
    num_rows: int, n: int, k: int, out_dtype: torch.dtype, device: torch.device
) -> None:
    _check(num_rows, n, k, device, out_dtype=out_dtype)


def test_swiglu_and_split_k(device: torch.device) -> None:
    _check(5, 37, 500, device, swiglu=True, tile=Tile(16, 64, 64, num_splits=3))


def test_many_rows(device: torch.device) -> None:
    _check(130, 40, 256, device)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("rms_eps", [None, 1e-5])
def test_rows_are_quantised(
    dtype: torch.dtype, rms_eps: float | None, device: torch.device
) -> None:
    x = rows_apart(5, 1000, dtype, device)
    x[2] = 0
    x[3, 7] = 1e4
    x_fp8, scale = quantize_fp8_rows(x, rms_eps=rms_eps)
    expected_fp8, expected_scale = quantize_fp8_rows_reference(x, rms_eps=rms_eps)
    torch.testing.assert_close(scale, expected_scale)
    # A last bit of the scale may move a value across a rounding border: one step of e4m3.
    torch.testing.assert_close(x_fp8.float(), expected_fp8.float(), rtol=0.13, atol=2**-9)
    assert not x_fp8[2].float().any()


def test_quantised_rows_stand_for_the_normalised_ones(device: torch.device) -> None:
    x = torch.randn(4, 512, device=device)
    x_fp8, scale = quantize_fp8_rows(x, rms_eps=1e-5)
    normalised = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(x_fp8.float() * scale[:, None], normalised, rtol=0.07, atol=0.01)


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    x_fp8, x_scale = quantize_fp8_rows(torch.randn(3, 256, device=device))
    weight = torch.randn(40, 256, device=device).to(E4M3)
    workspace = poisoned_workspace(device)
    runs = [
        fp8_gemm(
            x_fp8,
            x_scale,
            weight,
            torch.ones(40, device=device),
            tile=Tile(16, 64, 64, num_splits=2),
            workspace=workspace,
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert int(workspace.counters.abs().sum()) == 0


def test_no_rows(device: torch.device) -> None:
    x_fp8, x_scale = quantize_fp8_rows(torch.empty(0, 64, device=device))
    weight = torch.empty(20, 64, device=device).to(E4M3)
    y = fp8_gemm(x_fp8, x_scale, weight, torch.ones(20, device=device))
    assert y.shape == (0, 20) and y.dtype == BF16


def test_wrong_operands_are_refused_with_the_numbers(device: torch.device) -> None:
    x_fp8, x_scale = quantize_fp8_rows(torch.randn(2, 64, device=device))
    weight = torch.randn(20, 64, device=device).to(E4M3)
    ones = torch.ones(20, device=device)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        fp8_gemm(torch.randn(2, 64, device=device), x_scale, weight, ones)
    with pytest.raises(ValueError, match=r"x_scale has shape \(1,\)"):
        fp8_gemm(x_fp8, x_scale[:1], weight, ones)
    with pytest.raises(ValueError, match=r"weight has shape \(20, 32\)"):
        fp8_gemm(x_fp8, x_scale, weight[:, :32], ones)
    with pytest.raises(ValueError, match=r"65537 values.*65536"):
        quantize_fp8_rows(torch.empty(1, 65537, device=device))


def test_table_leads_the_candidates() -> None:
    for num_rows in (1, 8, 17, 64, 65, 1000):
        tiles = candidate_tiles(num_rows, 6144, 4096)
        assert tiles[0] == tile_for(num_rows, 6144, 4096)
        assert len(set(tiles)) == len(tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 17, 33, 64, 65, 1000])
@pytest.mark.parametrize("swiglu", [False, True])
def test_grid_of_shapes(num_rows: int, swiglu: bool, device: torch.device) -> None:
    for n, k in [(1, 4096), (63, 1000), (4096, 14336), (49152, 576)]:
        _check(num_rows, n, k, device, swiglu=swiglu)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 1024])
def test_candidate_tiles_agree(num_rows: int, device: torch.device) -> None:
    for tile in candidate_tiles(num_rows, 4096, 4096)[::9]:
        _check(num_rows, 4096, 4096, device, tile=tile)


@pytest.mark.gpu
def test_fast_accumulation(device: torch.device) -> None:
    _check(256, 4096, 4096, device, fast_accumulation=True)


@pytest.mark.gpu
def test_agrees_with_scaled_mm(device: torch.device) -> None:
    x_fp8, x_scale = quantize_fp8_rows(torch.randn(512, 4096, device=device).to(BF16))
    weight = torch.randn(6144, 4096, device=device).to(E4M3)
    weight_scale = torch.rand(6144, device=device) / 64
    expected = torch._scaled_mm(
        x_fp8, weight.t(), scale_a=x_scale[:, None], scale_b=weight_scale[None], out_dtype=BF16
    )
    assert_close(fp8_gemm(x_fp8, x_scale, weight, weight_scale), expected)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 256])
def test_operands_past_two_to_the_31_elements(num_rows: int, device: torch.device) -> None:
    n, k = 600_000, 4096
    x_fp8, x_scale = quantize_fp8_rows(torch.randn(num_rows, k, device=device).to(BF16))
    weight = torch.randint(0, 120, (n, k), dtype=torch.uint8, device=device).view(E4M3)
    weight_scale = torch.full((n,), 1e-4, device=device)
    y = fp8_gemm(x_fp8, x_scale, weight, weight_scale)
    last = slice(n - 1000, n)
    expected = fp8_gemm_reference(x_fp8, x_scale, weight[last], weight_scale[last])
    torch.testing.assert_close(y[:, last], expected, rtol=2e-2, atol=2e-2)
