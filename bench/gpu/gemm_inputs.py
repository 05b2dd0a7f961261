"""Activations and weights in every format that a linear layer is timed with.

Random numbers of each format directly: speed depends on neither scales nor the quality of a
quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.gpu.linear import WORKSPACE_FLOATS, WORKSPACE_TILES
from bench.gpu.cases import Scale, relative_error
from kernels.fp8_gemm import fp8_gemm, fp8_gemm_reference, quantize_fp8_rows
from kernels.gemm_launch import GemmWorkspace, Tile
from kernels.int4_packing import packed_width
from kernels.skinny_gemm import skinny_gemm, skinny_gemm_reference
from kernels.weight_only_gemm import weight_only_gemm, weight_only_gemm_reference

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn
WEIGHT_STD = 0.02
RMS_EPS = 1e-5


class Weights(Enum):
    """How the weights are kept, and with W8A8 the activations as well."""

    BF16 = "bf16"
    INT8 = "int8"
    INT4_128 = "int4 group 128"
    INT4_64 = "int4 group 64"
    FP8 = "fp8 weight-only"
    W8A8 = "w8a8"

    @property
    def group_size(self) -> int | None:
        return {Weights.INT4_128: 128, Weights.INT4_64: 64}.get(self)

    def num_bytes(self, n: int, k: int) -> float:
        """Of weights and scales."""
        group_size = self.group_size
        if group_size is not None:
            return n * k / 2 + 2 * n * k / group_size
        return 2.0 * n * k if self is Weights.BF16 else n * k + 4.0 * n


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the engine has a layer do besides the product, in the same launch."""

    normalizes: bool = False
    """By the root of the mean square of x; W8A8 does it as it quantises x."""
    is_swiglu: bool = False
    adds_residual: bool = False


AS_ENGINE = {
    "qkv": Surroundings(normalizes=True),
    "o": Surroundings(adds_residual=True),
    "gate_up": Surroundings(normalizes=True, is_swiglu=True),
    "down": Surroundings(adds_residual=True),
    "head": Surroundings(normalizes=True),
}


@dataclass(frozen=True, slots=True)
class GemmInputs:
    """One product x [M, K] times a weight of N rows."""

    kind: Weights
    x: Tensor
    weight: Tensor
    weight_scale: Tensor | None
    x_scale: Tensor | None
    """[M] of activations that are quantised already."""
    residual: Tensor | None
    rms_eps: float | None
    is_swiglu: bool
    out: Tensor
    workspace: GemmWorkspace

    def run(self, tile: Tile | None = None, *, launch_pdl: bool = False) -> Tensor:
        if self.kind is Weights.BF16:
            return skinny_gemm(
                self.x,
                self.weight,
                residual=self.residual,
                rms_eps=self.rms_eps,
                swiglu=self.is_swiglu,
                out=self.out,
                workspace=self.workspace,
                tile=tile,
                launch_pdl=launch_pdl,
            )
        assert self.weight_scale is not None
        if self.x_scale is not None:
            return fp8_gemm(
                self.x,
                self.x_scale,
                self.weight,
                self.weight_scale,
                residual=self.residual,
                swiglu=self.is_swiglu,
                out=self.out,
                workspace=self.workspace,
                tile=tile,
                launch_pdl=launch_pdl,
            )
        return weight_only_gemm(
            self.x,
            self.weight,
            self.weight_scale,
            group_size=self.kind.group_size,
            residual=self.residual,
            rms_eps=self.rms_eps,
            swiglu=self.is_swiglu,
            out=self.out,
            workspace=self.workspace,
            tile=tile,
            launch_pdl=launch_pdl,
        )

    def reference(self) -> Tensor:
        """In float32, rounded once at the end."""
        if self.kind is Weights.BF16:
            return skinny_gemm_reference(
                self.x,
                self.weight,
                residual=self.residual,
                rms_eps=self.rms_eps,
                swiglu=self.is_swiglu,
            )
        assert self.weight_scale is not None
        if self.x_scale is not None:
            return fp8_gemm_reference(
                self.x,
                self.x_scale,
                self.weight,
                self.weight_scale,
                residual=self.residual,
                swiglu=self.is_swiglu,
            )
        return weight_only_gemm_reference(
            self.x,
            self.weight,
            self.weight_scale,
            group_size=self.kind.group_size,
            residual=self.residual,
            rms_eps=self.rms_eps,
            swiglu=self.is_swiglu,
        )

    def error(self, tile: Tile | None = None, *, launch_pdl: bool = False) -> float:
        self.out.fill_(float("nan"))
        return relative_error(self.run(tile, launch_pdl=launch_pdl), self.reference())


def workspace(scale: Scale) -> GemmWorkspace:
    """One for all products that run after each other."""
    return GemmWorkspace.allocate(WORKSPACE_FLOATS, WORKSPACE_TILES, scale.device)


def gemm_inputs(
    scale: Scale,
    kind: Weights,
    shared: GemmWorkspace,
    num_rows: int,
    n: int,
    k: int,
    around: Surroundings | None = None,
) -> GemmInputs:
    """`n` rows of the weight; with SwiGLU the result has half as many columns."""
    around = around or Surroundings()
    num_columns = n // 2 if around.is_swiglu else n
    x, x_scale = scale.randn(num_rows, k), None
    if kind is Weights.W8A8:
        x, x_scale = quantize_fp8_rows(x, rms_eps=RMS_EPS if around.normalizes else None)
    weight, weight_scale = _weight(scale, kind, n, k)
    fuses_rms = around.normalizes and kind is not Weights.W8A8
    return GemmInputs(
        kind=kind,
        x=x,
        weight=weight,
        weight_scale=weight_scale,
        x_scale=x_scale,
        residual=scale.randn(num_rows, num_columns) if around.adds_residual else None,
        rms_eps=RMS_EPS if fuses_rms else None,
        is_swiglu=around.is_swiglu,
        out=torch.empty(num_rows, num_columns, device=scale.device, dtype=BF16),
        workspace=shared,
    )


def _weight(scale: Scale, kind: Weights, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    device = scale.device
    if kind is Weights.BF16:
        return scale.randn(n, k) * WEIGHT_STD, None
    factors = torch.rand(n, device=device) + 0.5
    if kind is Weights.INT8:
        weight = torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8)
        return weight, factors * (WEIGHT_STD / 73)
    group_size = kind.group_size
    if group_size is None:
        return scale.randn(n, k, dtype=FP8), factors * WEIGHT_STD
    # Every word is four valid weights.
    shape = (n, packed_width(k, group_size))
    words = torch.randint(-(1 << 15), 1 << 15, shape, device=device, dtype=torch.int16)
    # Neighbouring rows' scales side by side, as the engine keeps them.
    scales = torch.rand(-(-k // group_size), n, device=device) + 0.5
    return words, (scales * (WEIGHT_STD / 4.6)).to(BF16).t()


def cublas_out(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out=out)


def torch_layer(x: Tensor, weight: Tensor, around: Surroundings, residual: Tensor | None) -> Tensor:
    """The product and what surrounds it, in plain torch."""
    if around.normalizes:
        x_32 = x.float()
        x = (x_32 * torch.rsqrt(x_32.square().mean(-1, keepdim=True) + RMS_EPS)).to(x.dtype)
    y = F.linear(x, weight)
    if around.is_swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual
