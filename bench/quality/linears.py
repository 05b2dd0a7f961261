"""FP8 products on a CPU as a GPU computes them: both factors in e4m3, sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.core.quantization import Scheme
from baton.engine.layers.linear import CpuLinears, Linear
from baton.engine.quantization.rounding import quantize_rows_fp8
from baton.engine.quantization.weight import QuantizedWeight


class RoundedActivationLinear:
    """y = e4m3(x) e4m3(W)^T, with a scale per row of x and of W."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self._numbers = weight.numbers().float()
        self._scale = weight.scale
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x).to(x.dtype)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return (residual.float() + self._product(x)).to(residual.dtype)

    def _product(self, x: Tensor) -> Tensor:
        numbers, scale = quantize_rows_fp8(x)
        y = (numbers.float() @ self._numbers.T) * scale * self._scale
        return y if self._bias is None else y + self._bias.float()


class RoundedActivationLinears(CpuLinears):
    """The CPU engine's layers, but FP8 weights with activations rounded while the model runs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)

    def quantized(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        if weight.scheme is Scheme.FP8:
            return RoundedActivationLinear(weight, bias)
        return super().quantized(weight, bias)
