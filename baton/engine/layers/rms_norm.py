"""Root-mean-square normalisation in three small operators.

    y = x / sqrt(mean(x^2) + eps) * g = x / hypot(|x|, sqrt(d eps)) * (g sqrt(d))

Every normalised vector goes straight into a linear layer, so `g sqrt(d)` is folded into that
layer's weights when they are loaded (`gain_factor`) and only the division remains at run time.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BATCH_NORM_FROM_ROWS = 64
"""Below, the plain quotient is faster."""


def gain_factor(hidden_size: int) -> float:
    """The columns of the following linear layer are multiplied by the gain times this."""
    return math.sqrt(hidden_size)


class RmsNorm:
    """x / hypot(|x|, sqrt(d eps)) over the last dimension; the gain is folded elsewhere."""

    __slots__ = ("_eps_sum", "_floor")

    def __init__(self, hidden_size: int, eps: float, device: torch.device) -> None:
        self._eps_sum = hidden_size * eps
        self._floor = torch.tensor(math.sqrt(self._eps_sum), device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, hidden_size] -> the same shape and type; the norm is taken in float32."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        if x.dtype == torch.float32 or x.shape[0] < BATCH_NORM_FROM_ROWS:
            return torch.div(x, torch.hypot(norm, self._floor), out=torch.empty_like(x))
        # Rows taken as channels with mean 0 and variance |x|^2 give the same quotient, by the one
        # operator that scales 16-bit rows by float32 numbers without a float32 copy of x.
        squares = norm.square_().view(-1)
        mean = torch.zeros_like(squares)
        return torch.batch_norm(
            x[None], None, None, mean, squares, False, 0.0, self._eps_sum, False
        ).view_as(x)
