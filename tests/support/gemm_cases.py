"""Operands and tolerances that the GEMM tests share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gemm_launch import GemmWorkspace

TOLERANCES = {
    # One rounding of the result, and float32 sums in another order than the reference's.
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


class Epilogues(NamedTuple):
    """Operands of one epilogue, for x [M, K] and N output columns."""

    bias: Tensor | None
    residual: Tensor | None
    rms_eps: float | None
    swiglu: bool

    @property
    def rows_per_column(self) -> int:
        return 2 if self.swiglu else 1


def rows_apart(num_rows: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random [num_rows, k] whose rows do not follow each other in memory."""
    x = torch.randn(num_rows, k + 24, device=device).to(dtype)
    return x[:, 8 : 8 + k]


def full_epilogue(
    num_rows: int, n: int, dtype: torch.dtype, device: torch.device, *, swiglu: bool
) -> Epilogues:
    num_weight_rows = 2 * n if swiglu else n
    return Epilogues(
        bias=torch.randn(num_weight_rows, device=device).to(dtype),
        residual=rows_apart(num_rows, n, dtype, device),
        rms_eps=1e-5,
        swiglu=swiglu,
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def poisoned_workspace(device: torch.device) -> GemmWorkspace:
    workspace = GemmWorkspace.allocate(1 << 18, 1 << 10, device)
    workspace.parts.fill_(float("nan"))
    return workspace
