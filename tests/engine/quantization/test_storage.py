"""Checkpoint tensors of quantised weights: names, bits, parts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig, Scheme
from baton.engine.checkpoint import Checkpoint
from baton.engine.quantization.rounding import quantize
from baton.engine.quantization.storage import stored_tensors, take_quantized
from baton.engine.quantization.weight import QuantizedWeight

CPU = torch.device("cpu")
FP8 = QuantizationConfig(Scheme.FP8)
INT8 = QuantizationConfig(Scheme.INT8)
INT4 = QuantizationConfig(Scheme.INT4, 32)
CONFIGS = [FP8, QuantizationConfig(Scheme.FP8_WEIGHT), INT8, INT4]
SHAPE = (6, 128)


def make(config: QuantizationConfig) -> QuantizedWeight:
    return quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), config)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / "w.safetensors")
    return Checkpoint([folder / "w.safetensors"])


def bits(weight: QuantizedWeight) -> torch.Tensor:
    return weight.data.contiguous().view(torch.uint8)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_stored_weight_is_read_back_bit_by_bit(tmp_path: Path, config: QuantizationConfig) -> None:
    weight = make(config)
    checkpoint = write(tmp_path, stored_tensors("p", weight))
    read = take_quantized(checkpoint, "p", SHAPE, config, device=CPU)
    assert read.scheme is weight.scheme and read.group_size == weight.group_size
    assert torch.equal(bits(read), bits(weight))
    assert torch.equal(read.scale, weight.scale)
    assert checkpoint.left() == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_parts_are_read_as_they_would_be_cut(tmp_path: Path, config: QuantizationConfig) -> None:
    weight = make(config)
    for rows, columns in [(slice(2, 5), slice(None)), (slice(None), slice(32, 96))]:
        checkpoint = write(tmp_path, stored_tensors("p", weight))
        part = take_quantized(checkpoint, "p", SHAPE, config, part=(rows, columns), device=CPU)
        expected = weight.rows(rows).columns(slice(*columns.indices(128)))
        assert torch.equal(bits(part), bits(expected))
        assert torch.equal(part.scale, expected.scale)


@pytest.mark.parametrize(("config", "num_bits"), [(INT8, 8), (INT4, 4)], ids=["int8", "int4"])
def test_packed_words_hold_numbers_lowest_bits_first(
    config: QuantizationConfig, num_bits: int
) -> None:
    """Word j of a row is the sum of (number + 2^(bits-1)) * 2^(bits * i) over its numbers."""
    weight = make(config)
    tensors = stored_tensors("p", weight)
    numbers = (weight.numbers().long() + 2 ** (num_bits - 1)).view(6, -1, 32 // num_bits)
    shifts = torch.arange(32 // num_bits) * num_bits
    words = (numbers << shifts).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words)
    packed = tensors["p.weight_packed"]
    assert packed.dtype is torch.int32
    assert torch.equal(packed.long(), words)
    assert tensors["p.weight_shape"].tolist() == list(SHAPE)
    groups = 128 // config.group_size if config.group_size else 1
    assert tensors["p.weight_scale"].shape == (6, groups)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_any_floating_type_are_read(
    tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype
) -> None:
    tensors = stored_tensors("p", make(config))
    tensors["p.weight_scale"] = tensors["p.weight_scale"].to(dtype)
    read = take_quantized(write(tmp_path, tensors), "p", SHAPE, config, device=CPU)
    assert read.scale.dtype is torch.float32
    assert torch.equal(read.scale, make(config).scale)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_missing_scales_are_named(tmp_path: Path, config: QuantizationConfig) -> None:
    tensors = stored_tensors("p", make(config))
    del tensors["p.weight_scale"]
    with pytest.raises(ConfigError, match=r"no tensor 'p\.weight_scale'"):
        take_quantized(write(tmp_path, tensors), "p", SHAPE, config, device=CPU)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_misshapen_scales_are_named(tmp_path: Path, config: QuantizationConfig) -> None:
    tensors = stored_tensors("p", make(config))
    tensors["p.weight_scale"] = tensors["p.weight_scale"][:-1].clone()
    with pytest.raises(ConfigError, match=r"weight_scale.*has shape \(5"):
        take_quantized(write(tmp_path, tensors), "p", SHAPE, config, device=CPU)


def test_weights_of_another_group_size_are_refused(tmp_path: Path) -> None:
    tensors = stored_tensors("p", make(INT4))
    other = QuantizationConfig(Scheme.INT4, 64)
    with pytest.raises(ConfigError, match=r"weight_scale.*\(6, 4\).*\(6, 2\)"):
        take_quantized(write(tmp_path, tensors), "p", SHAPE, other, device=CPU)


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    tensors = {"p.weight": torch.zeros(SHAPE), "p.weight_scale": torch.ones(6, 1)}
    with pytest.raises(ConfigError, match=r"float32.*float8_e4m3fn"):
        take_quantized(write(tmp_path, tensors), "p", SHAPE, FP8, device=CPU)


def test_contradicting_shape_is_refused(tmp_path: Path) -> None:
    tensors = stored_tensors("p", make(INT4)) | {"p.weight_shape": torch.tensor([6, 120])}
    with pytest.raises(ConfigError, match=r"weight_shape says \[6, 120\]"):
        take_quantized(write(tmp_path, tensors), "p", SHAPE, INT4, device=CPU)


def test_part_that_cuts_groups_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, stored_tensors("p", make(INT4)))
    with pytest.raises(ConfigError, match="32 does not divide"):
        take_quantized(checkpoint, "p", SHAPE, INT4, part=(slice(None), slice(0, 48)), device=CPU)
