"""Where a launcher's work runs: on the GPU, in Triton's interpreter, or in the torch reference."""

from __future__ import annotations

import triton
from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """True when `x` is to be computed by a Triton kernel, false when by the torch reference.

    TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors.
    """
    return x.is_cuda or is_interpreted()


def is_interpreted() -> bool:
    """Triton's interpreter runs the kernels; what only a GPU has (dependent launch) is off."""
    return bool(triton.knobs.runtime.interpret)
