"""Root-mean-square normalisation in three small operators.

    y = x / sqrt(mean(x^2) + eps) * g = x / hypot(|x|, sqrt(d eps)) * (g sqrt(d))

Every normalised vector goes straight into a linear layer, so `g sqrt(d)` is folded into that
layer's weights when they are loaded (`folded_gain`) and only the division remains at run time.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def folded_gain(gain: Tensor) -> Tensor:
    """What the columns of the following linear layer are multiplied by, float32 [hidden_size]."""
    return gain.float() * math.sqrt(gain.numel())


class RmsNorm:
    """x / hypot(|x|, sqrt(d eps)) over the last dimension; the gain is folded elsewhere."""

    __slots__ = ("_floor",)

    def __init__(self, hidden_size: int, eps: float, device: torch.device) -> None:
        self._floor = torch.tensor(math.sqrt(hidden_size * eps), device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, hidden_size] -> the same shape and type; the norm is taken in float32."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.div(x, torch.hypot(norm, self._floor), out=torch.empty_like(x))
