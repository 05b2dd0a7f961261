"""The writer against the reference writer and the tensor library's rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from baton.core.errors import ConfigError
from baton.model_import.safetensors_file import (
    NamedArray,
    file_order,
    round_to_bfloat16,
    write_safetensors,
)

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_equals_that_of_the_reference_writer(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"b.10": (3, 5), "b.9": (7,), "a": (2, 2, 2), "ünï": (1,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    ours, reference = tmp_path / "ours", tmp_path / "reference"
    in_order = [NamedArray(name, arrays[name]) for name in file_order(arrays)]
    write_safetensors(ours, shapes, in_order, dtype)
    tensors = {name: torch.from_numpy(values).to(KINDS[dtype]) for name, values in arrays.items()}
    save_file(tensors, reference, {"format": "pt"})
    assert ours.read_bytes() == reference.read_bytes()


def test_rounding_equals_the_tensor_library_on_all_exponents() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, size=200_000, dtype=np.uint32)
    halfway = (bits & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, halfway, halfway - 1, halfway + 1]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    rounded = (round_to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(rounded, expected)


def test_infinity_and_nan_stay_what_they_are() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 3.4e38], dtype=np.float32)
    bits = round_to_bfloat16(values)
    assert [hex(b) for b in bits] == ["0x7f80", "0xff80", "0x7fc0", "0x7f80"]


def test_wrong_order_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    one = np.ones(1, dtype=np.float32)
    with pytest.raises(ConfigError, match="tensor b"):
        write_safetensors(
            tmp_path / "x", {"a": (1,), "b": (1,)}, [NamedArray("b", one)] * 2, "float32"
        )
    with pytest.raises(ConfigError, match=r"tensor a \(1,\)"):
        write_safetensors(tmp_path / "x", {"a": (2,)}, [NamedArray("a", one)], "float32")
    with pytest.raises(ConfigError, match="'int8' is not one of"):
        write_safetensors(tmp_path / "x", {}, [], "int8")
