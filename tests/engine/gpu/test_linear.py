"""Linear layers of the GPU engine keep what the checkpoint's scales say."""

from __future__ import annotations

import pytest
import torch

import baton.engine.gpu.linear as linear_module
from baton.core.quantization import QuantizationConfig, Scheme
from baton.engine.gpu.linear import GpuLinears, LaunchOptions, int4_scale_dtype
from baton.engine.quantization.rounding import quantize

NUM_ROWS, WIDTH, GROUP_SIZE = 64, 256, 64
QUERY_FACTOR = 128**-0.5
"""1 / sqrt(head_dim), no power of two: what it multiplies has no short form any more."""


@pytest.mark.parametrize(
    ("magnitude", "tolerance"),
    [
        pytest.param(1.0, 2**-11, id="float16"),
        pytest.param(1e-4, 1e-5, id="below float16's normal range"),
        pytest.param(1e7, 1e-5, id="above it"),
    ],
)
def test_int4_scales_keep_the_query_factor(
    device: torch.device, magnitude: float, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_ROWS, WIDTH, generator=generator) * magnitude
    x = torch.randn(2, WIDTH, generator=generator)
    config = QuantizationConfig(Scheme.INT4, GROUP_SIZE)
    quantized = quantize(weight, config).scaled(QUERY_FACTOR)
    expected = x.double() @ quantized.dequantized(torch.float32).double().T
    linears = GpuLinears(torch.float32, LaunchOptions.allocate(device, is_pdl=False))
    on_device = type(quantized)(
        quantized.scheme, quantized.data.to(device), quantized.scale.to(device), GROUP_SIZE
    )
    result = linears.quantized(on_device, None).project(x.to(device)).cpu().double()
    # Of one row's error against its size: each group's scale errs on its own.
    error = (result - expected).norm() / expected.norm()
    assert error < tolerance


def test_int4_rows_of_padding_do_not_cost_the_others_bytes(device: torch.device) -> None:
    """Their scale is 0, which float16 holds."""
    config = QuantizationConfig(Scheme.INT4, GROUP_SIZE)
    weight = quantize(torch.randn(48, WIDTH), config).padded_rows(NUM_ROWS)
    on_device = type(weight)(
        weight.scheme, weight.data.to(device), weight.scale.to(device), GROUP_SIZE
    )
    linear = GpuLinears(torch.float32, LaunchOptions.allocate(device, is_pdl=False)).quantized(
        on_device, None
    )
    assert int4_scale_dtype(weight.scale) is torch.float16
    assert (linear.project(torch.ones(1, WIDTH, device=device))[0, 48:] == 0).all()


@pytest.mark.parametrize(
    "config",
    [QuantizationConfig(Scheme.INT8), QuantizationConfig(Scheme.INT4, GROUP_SIZE)],
    ids=["int8", "int4"],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_many_rows_are_multiplied_by_widened_parts(
    config: QuantizationConfig,
    has_bias: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three parts, the last one smaller, in the scratch that two layers share."""
    num_rows = 9
    monkeypatch.setattr(linear_module, "BULK_ROWS", num_rows)
    monkeypatch.setattr(linear_module, "SCRATCH_BYTES", 2 * 27 * WIDTH)
    torch.manual_seed(0)
    linears = GpuLinears(torch.float32, LaunchOptions.allocate(device, is_pdl=False))
    x = torch.randn(num_rows, WIDTH, device=device)
    normalised = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5)
    for _ in range(2):
        weight = quantize(torch.randn(NUM_ROWS, WIDTH), config)
        on_device = type(weight)(
            weight.scheme, weight.data.to(device), weight.scale.to(device), weight.group_size
        )
        bias = torch.randn(NUM_ROWS, device=device) if has_bias else None
        linear = linears.quantized(on_device, bias)
        dense = weight.dequantized(torch.float32).to(device)
        product = normalised @ dense.T + (0 if bias is None else bias)
        tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(product.abs().max())}
        torch.testing.assert_close(linear.project(x, rms_eps=1e-5), product, **tolerance)
        gate, up = product.chunk(2, dim=-1)
        torch.testing.assert_close(
            linear.project_swiglu(x, rms_eps=1e-5), torch.nn.functional.silu(gate) * up, **tolerance
        )
        residual = torch.randn(num_rows, NUM_ROWS, device=device)
        expected = residual + x @ dense.T + (0 if bias is None else bias)
        assert linear.add_to_(residual, x) is residual
        torch.testing.assert_close(residual, expected, **tolerance)
