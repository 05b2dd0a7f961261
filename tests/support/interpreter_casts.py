"""Float conversions in Triton's interpreter, done as a GPU does them: rounded to nearest even.

The interpreter itself truncates from float32 to bfloat16 and, on the way to 8-bit floats, drops
the carry of a rounded mantissa, which is off by a factor of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}


@contextmanager
def rounding_casts() -> Iterator[None]:
    """Conversions between the types above are torch's own while this lasts."""
    convert = interpreter._convert_float

    def convert_rounded(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if str(source) not in TORCH_DTYPES or str(target) not in TORCH_DTYPES:
            return convert(data, source, target, rounding_mode)
        source_dtype, target_dtype = TORCH_DTYPES[str(source)], TORCH_DTYPES[str(target)]
        raw = torch.from_numpy(np.array(data).view(np.uint8).reshape(-1))
        rounded = raw.view(source_dtype).to(target_dtype).view(torch.uint8).numpy()
        return rounded.view(f"uint{8 * target_dtype.itemsize}").reshape(np.shape(data))

    with mock.patch.object(interpreter, "_convert_float", convert_rounded):
        yield
