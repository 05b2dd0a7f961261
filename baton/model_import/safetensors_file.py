"""Write a safetensors file tensor by tensor, so that memory holds one of them at a time.

    8 bytes little endian: header length | header, JSON padded with spaces | tensor data

The order and the spelling are those of the reference writer, so equal tensors give equal files.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from baton.core.errors import ConfigError

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
HEADER_ALIGNMENT = 8


class NamedArray(NamedTuple):
    name: str
    values: np.ndarray


def file_order(names: Iterable[str]) -> list[str]:
    """The order in which `write_safetensors` wants the tensors of one dtype."""
    return sorted(names)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[NamedArray], dtype: str
) -> None:
    """`arrays` are float32 of `shapes` in `file_order`; they are rounded to `dtype`."""
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_NAMES)}")
    with path.open("wb") as opened:
        opened.write(_header(shapes, dtype))
        for (name, values), expected in zip(arrays, file_order(shapes), strict=True):
            if name != expected or values.shape != shapes[name]:
                raise ConfigError(
                    f"tensor {name} {values.shape} came where {expected} {shapes[expected]} was due"
                )
            opened.write(_encode(values, dtype).tobytes())


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in file_order(shapes):
        end = offset + math.prod(shapes[name]) * ITEM_BYTES[dtype]
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _encode(values: np.ndarray, dtype: str) -> np.ndarray:
    exact = np.ascontiguousarray(values, dtype="<f4")
    return exact if dtype == "float32" else round_to_bfloat16(exact)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    is_odd = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + is_odd) >> 16).astype("<u2")
    # Rounding could carry a NaN's payload into infinity.
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
