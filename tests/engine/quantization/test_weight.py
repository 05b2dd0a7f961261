"""Parts of a quantised matrix are the same parts of the dequantised one."""

from __future__ import annotations

import pytest
import torch

from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig, Scheme
from baton.engine.quantization.rounding import quantize
from baton.engine.quantization.weight import QuantizedWeight, stacked

CONFIGS = [
    QuantizationConfig(Scheme.FP8),
    QuantizationConfig(Scheme.INT8),
    QuantizationConfig(Scheme.INT4, 32),
    QuantizationConfig(Scheme.INT4, 64),
]


def make(config: QuantizationConfig, rows: int = 12, width: int = 192) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows)
    return quantize(torch.randn(rows, width, generator=generator), config)


def values(weight: QuantizedWeight) -> torch.Tensor:
    return weight.dequantized(torch.float32)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_parts_put_together_are_the_whole(config: QuantizationConfig) -> None:
    whole = make(config)
    rows = [whole.rows(slice(0, 5)), whole.rows(slice(5, 12))]
    assert torch.equal(values(stacked(rows)), values(whole))
    columns = [whole.columns(slice(0, 64)), whole.columns(slice(64, 192))]
    assert [part.shape for part in columns] == [(12, 64), (12, 128)]
    assert torch.equal(torch.cat([values(part) for part in columns], 1), values(whole))


@pytest.mark.parametrize("columns", [slice(0, 32), slice(32, 192), slice(0, 100)])
def test_cut_groups_are_refused(columns: slice) -> None:
    with pytest.raises(ConfigError, match="cut groups of 64"):
        make(QuantizationConfig(Scheme.INT4, 64)).columns(columns)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_factor_goes_into_the_scales(config: QuantizationConfig) -> None:
    weight = make(config)
    assert torch.equal(values(weight.scaled(0.125)), values(weight) / 8)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_padding_rows_are_zero(config: QuantizationConfig) -> None:
    padded = make(config).padded_rows(15)
    assert padded.shape == (15, 192)
    assert torch.equal(values(padded)[:12], values(make(config)))
    assert (values(padded)[12:] == 0).all()
    assert (padded.numbers()[12:].float() == 0).all()


def test_int4_numbers_lie_low_half_first() -> None:
    data = torch.tensor([[0x10, 0x8F] + [0x88] * 14], dtype=torch.uint8)
    weight = QuantizedWeight(Scheme.INT4, data, torch.full((1, 1), 0.5), 32)
    assert weight.numbers()[0, :5].tolist() == [-8, -7, 7, 0, 0]
    assert values(weight)[0, :4].tolist() == [-4.0, -3.5, 3.5, 0.0]


@pytest.mark.parametrize(
    ("config", "num_bytes"),
    list(zip(CONFIGS, (2352, 2352, 12 * (96 + 24), 12 * (96 + 12)), strict=True)),
    ids=lambda v: getattr(v, "name", ""),
)
def test_bytes_are_those_of_numbers_and_scales(config: QuantizationConfig, num_bytes: int) -> None:
    assert make(config).num_bytes == num_bytes
