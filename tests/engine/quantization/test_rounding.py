"""Errors of each scheme stay within what its bits allow; special rows; activations."""

from __future__ import annotations

import pytest
import torch

from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig, Scheme
from baton.engine.quantization import rounding
from baton.engine.quantization.rounding import FP8_MAX, quantize, quantize_rows_fp8, to_fp8

INT4_32 = QuantizationConfig(Scheme.INT4, 32)
CONFIGS = [
    QuantizationConfig(Scheme.FP8),
    QuantizationConfig(Scheme.FP8_WEIGHT),
    QuantizationConfig(Scheme.INT8),
    INT4_32,
    QuantizationConfig(Scheme.INT4, 64),
    QuantizationConfig(Scheme.INT4, 128),
]
# Error over size, both as root mean square, of normal numbers. e4m3 keeps 3 bits after the first:
# steps of 1/8 to 1/16 of a number, uniform error 1/sqrt(12) of a step. INT8 spreads 127 steps over
# about 3.2 deviations. INT4 figures are rounded up from those of a million numbers.
RELATIVE_ERRORS = {
    Scheme.FP8: 0.029,
    Scheme.FP8_WEIGHT: 0.029,
    Scheme.INT8: 0.010,
    32: 0.085,
    64: 0.094,
    128: 0.100,
}


def normal(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_error_is_within_the_bits_of_the_scheme(
    config: QuantizationConfig, scale_dtype: torch.dtype
) -> None:
    weight = normal(48, 256) * torch.logspace(-4, 3, 48)[:, None]
    quantized = quantize(weight, config, scale_dtype=scale_dtype)
    assert quantized.shape == (48, 256)
    assert torch.equal(quantized.scale, quantized.scale.to(scale_dtype).float())
    error = (quantized.dequantized(torch.float32) - weight).square().mean(1).sqrt()
    assert config.scheme is not None
    bound = RELATIVE_ERRORS[config.group_size or config.scheme]
    assert (error / weight.square().mean(1).sqrt()).mean() < bound


def test_int8_rounds_each_number_to_the_nearest_step() -> None:
    weight = normal(5, 64)
    quantized = quantize(weight, QuantizationConfig(Scheme.INT8))
    error = (quantized.dequantized(torch.float32) - weight).abs()
    # The scale's own rounding may push a row's largest number past 127: by 1/256 of it at most.
    assert (error <= quantized.scale[:, None] * (0.5 + 127 / 256)).all()
    assert (error.median(dim=1).values <= quantized.scale * 0.3).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int4_search_finds_exact_numbers(sign: float) -> None:
    """Groups that are multiples -8..7 of a step, or 8..-7, come back as they were."""
    numbers = torch.arange(-8, 8).repeat(6, 4).float()[:, :32]
    weight = sign * numbers * torch.tensor([2.0**-i for i in range(6)])[:, None]
    quantized = quantize(weight, INT4_32)
    assert torch.equal(quantized.dequantized(torch.float32), weight)


def test_int4_error_is_below_that_of_the_plain_scale() -> None:
    weight = normal(4096, 64)
    plain = weight.abs().amax(1, keepdim=True) / 7
    plain_error = ((weight / plain).round() * plain - weight).square().mean().sqrt()
    quantized = quantize(weight, QuantizationConfig(Scheme.INT4, 64))
    error = (quantized.dequantized(torch.float32) - weight).square().mean().sqrt()
    assert float(error) == pytest.approx(0.09, abs=0.005)
    assert float(plain_error) == pytest.approx(0.11, abs=0.005)


def test_a_finer_search_would_find_little(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(4096, 64)
    errors = []
    for steps in (20, 40):
        factors = tuple(s * i / steps for i in range(steps // 2, steps * 6 // 5) for s in (1, -1))
        monkeypatch.setattr(rounding, "INT4_FACTORS", factors)
        values = quantize(weight, QuantizationConfig(Scheme.INT4, 64)).dequantized(torch.float32)
        errors.append((values - weight).square().mean().sqrt())
    assert 0.99 * errors[0] < errors[1] < errors[0]


def test_important_channels_are_rounded_more_finely() -> None:
    """The weighted error falls, that of the important channels most."""
    weight = normal(64, 128)
    importance = torch.ones(128)
    importance[::16] = 100.0
    errors = {}
    for name, given in (("equal", None), ("weighted", importance)):
        quantized = quantize(weight, INT4_32, importance=given)
        errors[name] = (quantized.dequantized(torch.float32) - weight).square().mean(0)
    assert errors["weighted"][::16].mean() < 0.5 * errors["equal"][::16].mean()
    weighted = [float((error * importance).sum()) for error in errors.values()]
    assert weighted[1] < 0.7 * weighted[0]


def test_channels_that_a_text_never_excites_keep_their_values() -> None:
    weight = normal(8, 64)
    importance = torch.zeros(64)
    importance[:32] = 1.0
    values = quantize(weight, INT4_32, importance=importance).dequantized(torch.float32)
    error = (values - weight)[:, 32:].square().mean().sqrt()
    assert error < RELATIVE_ERRORS[32] * 1.1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_zero_rows_stay_zero(config: QuantizationConfig) -> None:
    weight = normal(3, 128)
    weight[1] = 0
    values = quantize(weight, config).dequantized(torch.float32)
    assert torch.isfinite(values).all()
    assert (values[1] == 0).all()
    assert (values[0] != 0).any()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_rows_are_quantised_alone_and_the_same_each_time(config: QuantizationConfig) -> None:
    weight = normal(1030, 128)
    whole = quantize(weight, config)
    part = quantize(weight[1020:], config)
    assert torch.equal(
        whole.rows(slice(1020, None)).data.view(torch.uint8), part.data.view(torch.uint8)
    )
    assert torch.equal(whole.scale[1020:], part.scale)


def test_width_that_is_no_whole_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="128 does not divide"):
        quantize(normal(2, 192), QuantizationConfig(Scheme.INT4, 128))


def test_activations_get_a_scale_per_row() -> None:
    x = normal(7, 100) * torch.logspace(-5, 4, 7)[:, None]
    x[3] = 0
    numbers, scale = quantize_rows_fp8(x.bfloat16())
    assert numbers.dtype is torch.float8_e4m3fn and scale.shape == (7, 1)
    restored = numbers.float() * scale
    assert torch.equal(restored[3], torch.zeros(100))
    assert (numbers.float().abs().amax(1)[[0, 1, 2, 4, 5, 6]] == FP8_MAX).all()
    # Half a step of 3 bits after the first, and what is below the smallest normal number.
    largest = x.abs().amax(1, keepdim=True)
    assert ((restored - x.bfloat16().float()).abs() <= x.abs() / 15 + largest * 2**-18).all()


def test_what_exceeds_e4m3_becomes_its_largest_number() -> None:
    values = to_fp8(torch.tensor([1e9, -1e9, 449.0, 448.0, 0.0])).float()
    assert values.tolist() == [448.0, -448.0, 448.0, 448.0, 0.0]
