"""Matrix products with weights that are laid out once, at load time.

oneDNN multiplies fastest with weights in a blocked layout of its own choosing. torch's `linear`
converts them on every call, which costs more than the product itself for a few rows; here the
weights are converted once and the original is dropped.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.rms_norm import gain_factor
from baton.engine.quantization.weight import QuantizedWeight

LinearT_co = TypeVar("LinearT_co", covariant=True)

PACK_NUM_ROWS = 64
"""Rows the packed layout is chosen for. One row gives another float32 layout, which is 1.5-2x
slower from eight rows on and no faster below; any larger number gives the same layout."""


class Linear(Protocol):
    """y = x W^T + b, for x [num_rows, in_features]."""

    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, out_features]"""
        ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, in a new tensor [num_rows, out_features]."""
        ...


class LinearFactory(Protocol[LinearT_co]):
    """How a device multiplies: turns weights of one rank into its linear layers."""

    def plain(self, weight: Tensor, bias: Tensor | None) -> LinearT_co:
        """weight [out_features, in_features] and bias [out_features] in the engine's type, on the
        device; the factory owns them."""
        ...

    def quantized(self, weight: QuantizedWeight, bias: Tensor | None) -> LinearT_co:
        """The same for a quantised weight; its scales hold every constant factor."""
        ...

    def gain_factor(self, hidden_size: int) -> float:
        """What norm gains are multiplied by before they are folded into the weights: 1 when the
        device's norm divides by the root of the mean square."""
        ...


class PackedLinear:
    """oneDNN with prepacked weights; the residual is added before the result is rounded."""

    __slots__ = ("_bias", "_call", "_call_binary", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        operators = torch.ops.mkldnn
        self._weight = operators._reorder_linear_weight(weight.contiguous(), PACK_NUM_ROWS)
        self._bias = bias
        self._call = operators._linear_pointwise.default
        self._call_binary = operators._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._call(x, self._weight, self._bias, "none", [], "")
        return y

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self._call_binary(x, residual, self._weight, self._bias, "add")
        return y


class PlainLinear:
    """torch's own product, for devices and types that oneDNN does not serve."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias).add_(residual)


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest form for the weight's device and type. `weight` is [out, in]; drop it after."""
    if can_pack(weight.device, weight.dtype):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True when oneDNN serves this combination natively on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class CpuLinears:
    """The LinearFactory of the CPU engine.

    Quantised weights are turned back into the engine's type when they are loaded: no product of
    torch on CPUs takes e4m3 or grouped integers and is faster than oneDNN in bfloat16, so a
    quantised folder runs here as fast and as large as a plain one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def plain(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return make_linear(weight, bias)

    def quantized(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        return make_linear(weight.dequantized(self._dtype), bias)

    def gain_factor(self, hidden_size: int) -> float:
        return gain_factor(hidden_size)
