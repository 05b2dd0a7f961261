"""Linear layers on the GPU: which kernel serves how many rows.

Up to SKINNY_ROWS rows a product is bound by reading the weights; the kernels for them take the
normalisation before the product and the activation or residual after it into the same launch.
Above, cuBLAS multiplies plain weights and the rest runs by itself. The quantised kernels keep
everything in one launch; from BULK_ROWS rows on, weights that are only stored in 8 or 4 bits are
widened into a scratch buffer, which all layers share, and multiplied like plain ones.

Not known here: where weights come from, tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.core.quantization import Scheme
from baton.engine.quantization.weight import QuantizedWeight
from kernels.dequantize_weight import dequantize_weight
from kernels.fp8_gemm import fp8_gemm, quantize_fp8_rows
from kernels.gemm_launch import GemmWorkspace
from kernels.rms_norm import rms_norm
from kernels.skinny_gemm import skinny_gemm
from kernels.swiglu import swiglu
from kernels.weight_only_gemm import pack_int4, weight_only_gemm

SKINNY_ROWS = 64
BULK_ROWS = 512
"""Widening a weight takes as long as multiplying some 300 rows by it; widening it inside the
product costs cuBLAS's lead, more than half the time with many rows."""
SCRATCH_BYTES = 256 << 20
"""Of widened weights at once; larger matrices are multiplied in parts."""
WORKSPACE_FLOATS = 16 << 20
"""Parts of one split product: some 530 programs of 64 rows by 128 columns, SwiGLU twice as many."""
WORKSPACE_TILES = 1 << 14


class GpuLinear(Protocol):
    """y = x W^T + b for x [num_rows, in_features], with what surrounds it in a decoder layer."""

    def project(
        self, x: Tensor, *, rms_eps: float | None = None, out: Tensor | None = None
    ) -> Tensor:
        """[num_rows, out_features]; with `rms_eps` of x / sqrt(mean(x^2) + rms_eps)."""
        ...

    def project_swiglu(self, x: Tensor, *, rms_eps: float) -> Tensor:
        """silu(y[:, :half]) * y[:, half:] of the normalised x, [num_rows, out_features / 2]."""
        ...

    def add_to_(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual += y, in place; returned."""
        ...


class Scratch:
    """Memory for one widened weight at a time, taken when the first is."""

    __slots__ = ("_buffer", "_num_values")

    def __init__(self) -> None:
        self._num_values = 0
        self._buffer: Tensor | None = None

    def reserve(self, num_values: int) -> None:
        """Views may have this many values."""
        self._num_values = max(self._num_values, num_values)

    def view(self, like: Tensor, num_rows: int, width: int) -> Tensor:
        """[num_rows, width] of `like`'s dtype and device; holds what the last user left."""
        if self._buffer is None or self._buffer.numel() < num_rows * width:
            size = max(self._num_values, num_rows * width)
            self._buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffer[: num_rows * width].view(num_rows, width)


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What all linear layers of a rank share."""

    workspace: GemmWorkspace
    """Of split products; kernels of one stream use it in turn."""
    is_pdl: bool
    """Kernels start while the one before ends."""
    scratch: Scratch = field(default_factory=Scratch)

    @classmethod
    def allocate(cls, device: torch.device, *, is_pdl: bool) -> LaunchOptions:
        workspace = GemmWorkspace.allocate(WORKSPACE_FLOATS, WORKSPACE_TILES, device)
        return cls(workspace, is_pdl)


class FusedKernel(Protocol):
    """A product with bound weights; everything around it is part of the launch."""

    def __call__(
        self,
        x: Tensor,
        *,
        rms_eps: float | None = None,
        residual: Tensor | None = None,
        swiglu: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `kernels.skinny_gemm`."""
        ...


class FusedGpuLinear:
    """One kernel for any number of rows."""

    __slots__ = ("_kernel",)

    def __init__(self, kernel: FusedKernel) -> None:
        self._kernel = kernel

    def project(
        self, x: Tensor, *, rms_eps: float | None = None, out: Tensor | None = None
    ) -> Tensor:
        return self._kernel(x, rms_eps=rms_eps, out=out)

    def project_swiglu(self, x: Tensor, *, rms_eps: float) -> Tensor:
        return self._kernel(x, rms_eps=rms_eps, swiglu=True)

    def add_to_(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._kernel(x, residual=residual, out=residual)


class PlainGpuLinear:
    """Weights in the engine's own type: fused for few rows, cuBLAS for many."""

    __slots__ = ("_bias", "_skinny", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, options: LaunchOptions) -> None:
        """weight [out_features, in_features]"""
        self._weight = weight
        self._bias = bias
        self._skinny = FusedGpuLinear(
            partial(
                skinny_gemm,
                weight=weight,
                bias=bias,
                workspace=options.workspace,
                launch_pdl=options.is_pdl,
            )
        )

    def project(
        self, x: Tensor, *, rms_eps: float | None = None, out: Tensor | None = None
    ) -> Tensor:
        if x.shape[0] <= SKINNY_ROWS:
            return self._skinny.project(x, rms_eps=rms_eps, out=out)
        x = x if rms_eps is None else rms_norm(x, eps=rms_eps)
        if out is None:
            return F.linear(x, self._weight, self._bias)
        if self._bias is None:
            return torch.mm(x, self._weight.t(), out=out)
        return torch.addmm(self._bias, x, self._weight.t(), out=out)

    def project_swiglu(self, x: Tensor, *, rms_eps: float) -> Tensor:
        if x.shape[0] <= SKINNY_ROWS:
            return self._skinny.project_swiglu(x, rms_eps=rms_eps)
        return swiglu(F.linear(rms_norm(x, eps=rms_eps), self._weight, self._bias))

    def add_to_(self, residual: Tensor, x: Tensor) -> Tensor:
        if x.shape[0] <= SKINNY_ROWS:
            return self._skinny.add_to_(residual, x)
        residual.addmm_(x, self._weight.t())
        return residual if self._bias is None else residual.add_(self._bias)


class WeightOnlyLinear:
    """Weights of 8 or 4 bits, widened on their way to the product; activations as they are."""

    __slots__ = ("_bias", "_data", "_fused", "_group_size", "_scale", "_scratch", "_shape")

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, options: LaunchOptions
    ) -> None:
        data, scale = weight.data, weight.scale
        if weight.group_size is not None:
            data = pack_int4(weight.numbers().to(torch.int8), group_size=weight.group_size)
            # The kernel walks along rows within a group: neighbouring rows' scales side by side.
            scale = scale.to(int4_scale_dtype(scale)).t().contiguous().t()
        self._data, self._scale, self._group_size = data, scale, weight.group_size
        self._bias = bias
        self._shape = weight.shape
        self._scratch = options.scratch
        self._scratch.reserve(self._part_rows * weight.shape[1])
        self._fused = FusedGpuLinear(
            partial(
                weight_only_gemm,
                weight=data,
                scale=scale,
                group_size=weight.group_size,
                bias=bias,
                workspace=options.workspace,
                launch_pdl=options.is_pdl,
            )
        )

    def project(
        self, x: Tensor, *, rms_eps: float | None = None, out: Tensor | None = None
    ) -> Tensor:
        if x.shape[0] < BULK_ROWS:
            return self._fused.project(x, rms_eps=rms_eps, out=out)
        x = x if rms_eps is None else rms_norm(x, eps=rms_eps)
        if out is None:
            out = x.new_empty(x.shape[0], self._shape[0])
        for rows, weight in self._widened(x):
            torch.mm(x, weight.t(), out=out[:, rows])
        return out if self._bias is None else out.add_(self._bias)

    def project_swiglu(self, x: Tensor, *, rms_eps: float) -> Tensor:
        if x.shape[0] < BULK_ROWS:
            return self._fused.project_swiglu(x, rms_eps=rms_eps)
        return swiglu(self.project(x, rms_eps=rms_eps))

    def add_to_(self, residual: Tensor, x: Tensor) -> Tensor:
        if x.shape[0] < BULK_ROWS:
            return self._fused.add_to_(residual, x)
        for rows, weight in self._widened(x):
            residual[:, rows].addmm_(x, weight.t())
        return residual if self._bias is None else residual.add_(self._bias)

    @property
    def _part_rows(self) -> int:
        """Rows that are widened at once."""
        num_rows, width = self._shape
        return min(num_rows, max(SCRATCH_BYTES // (2 * width), 1))

    def _widened(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight in x's dtype, valid until the next are taken."""
        num_rows, width = self._shape
        for first in range(0, num_rows, self._part_rows):
            rows = slice(first, min(first + self._part_rows, num_rows))
            weight = self._scratch.view(x, rows.stop - first, width)
            yield (
                rows,
                dequantize_weight(
                    self._data[rows], self._scale[rows], group_size=self._group_size, out=weight
                ),
            )


def int4_scale_dtype(scale: Tensor) -> torch.dtype:
    """float16 where it holds all scales in its normal range, else float32.

    A scale in the checkpoint has the 8 bits of bfloat16, which float16 holds exactly; the query
    factor, multiplied in since, is rounded to 11 bits. Twice the bytes would be 6 % more to read.
    """
    limits = torch.finfo(torch.float16)
    sizes = scale.abs()
    # Rows of padding have a scale of 0.
    is_normal = (sizes == 0) | ((sizes >= limits.smallest_normal) & (sizes <= limits.max))
    return torch.float16 if bool(is_normal.all()) else torch.float32


def fp8_kernel(
    weight: QuantizedWeight, bias: Tensor | None, options: LaunchOptions, dtype: torch.dtype
) -> FusedKernel:
    """e4m3 weights times activations that are rounded to e4m3 with a scale per token.

    `dtype`: what the product is rounded to.
    """

    def multiply(
        x: Tensor,
        *,
        rms_eps: float | None = None,
        residual: Tensor | None = None,
        swiglu: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        x_fp8, x_scale = quantize_fp8_rows(x, rms_eps=rms_eps, launch_pdl=options.is_pdl)
        return fp8_gemm(
            x_fp8,
            x_scale,
            weight.data,
            weight.scale,
            bias=bias,
            residual=residual,
            swiglu=swiglu,
            out_dtype=dtype,
            out=out,
            workspace=options.workspace,
            launch_pdl=options.is_pdl,
        )

    return multiply


class GpuLinears:
    """The `LinearFactory` of the GPU engine."""

    def __init__(self, dtype: torch.dtype, options: LaunchOptions) -> None:
        self._dtype = dtype
        self._options = options

    def plain(self, weight: Tensor, bias: Tensor | None) -> GpuLinear:
        return PlainGpuLinear(weight, bias, self._options)

    def quantized(self, weight: QuantizedWeight, bias: Tensor | None) -> GpuLinear:
        if weight.scheme is Scheme.FP8:
            return FusedGpuLinear(fp8_kernel(weight, bias, self._options, self._dtype))
        return WeightOnlyLinear(weight, bias, self._options)

    def gain_factor(self, hidden_size: int) -> float:
        """The kernels divide by the root of the mean square."""
        return 1.0
