"""Linear layers on the GPU: which kernel serves how many rows.

Up to SKINNY_ROWS rows a product is bound by reading the weights; the kernels for them take the
normalisation before the product and the activation or residual after it into the same launch.
Above, cuBLAS multiplies plain weights and the rest runs by itself, while the quantised kernels
keep everything in one launch.

Not known here: where weights come from, tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.core.quantization import Scheme
from baton.engine.quantization.weight import QuantizedWeight
from kernels.fp8_gemm import fp8_gemm, quantize_fp8_rows
from kernels.gemm_launch import GemmWorkspace
from kernels.rms_norm import rms_norm
from kernels.skinny_gemm import skinny_gemm
from kernels.swiglu import swiglu
from kernels.weight_only_gemm import pack_int4, weight_only_gemm

SKINNY_ROWS = 64
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


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What all linear layers of a rank share."""

    workspace: GemmWorkspace
    """Of split products; kernels of one stream use it in turn."""
    is_pdl: bool
    """Kernels start while the one before ends."""

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


def weight_only_kernel(
    weight: QuantizedWeight, bias: Tensor | None, options: LaunchOptions
) -> FusedKernel:
    """Weights of 8 or 4 bits, widened on their way to the product; activations as they are."""
    data, scale = weight.data, weight.scale
    if weight.group_size is not None:
        data = pack_int4(weight.numbers().to(torch.int8), group_size=weight.group_size)
        # The kernel walks along rows within a group: neighbouring rows' scales side by side.
        scale = scale.to(int4_scale_dtype(scale)).t().contiguous().t()
    return partial(
        weight_only_gemm,
        weight=data,
        scale=scale,
        group_size=weight.group_size,
        bias=bias,
        workspace=options.workspace,
        launch_pdl=options.is_pdl,
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
        return FusedGpuLinear(weight_only_kernel(weight, bias, self._options))

    def gain_factor(self, hidden_size: int) -> float:
        """The kernels divide by the root of the mean square."""
        return 1.0
