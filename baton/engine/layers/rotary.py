"""Rotary position embedding with the frequency scalings of the Llama family.

Tables are gathered once a step and applied to the queries and keys of all heads together, in
place. The pairing is (i, i + head_dim / 2), as in Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from baton.engine.model_config import RopeConfig, RopeType


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2], radians a position.

    Source: Su et al., "RoFormer", 2021, §3.2; llama3 scaling: the Llama 3.1 release
    (wavelengths above original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor are kept, between them the two are blended linearly).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.rope_type is RopeType.DEFAULT:
        return frequencies
    stretched = frequencies / config.factor
    if config.rope_type is RopeType.LINEAR:
        return stretched
    original = config.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * stretched + blend * frequencies


class RotaryTables(NamedTuple):
    """[num_rows, 1, head_dim]: cosines, and sines with the first half negated."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """Tables of all positions up to the longest sequence."""

    __slots__ = ("_cos", "_half", "_sin")

    def __init__(
        self,
        config: RopeConfig,
        *,
        head_dim: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        positions = torch.arange(max_positions, dtype=torch.int64).float()
        angles = torch.outer(positions, inverse_frequencies(config, head_dim))
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), dim=-1)[:, None].to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1)[:, None].to(device, dtype)
        self._half = head_dim // 2

    def tables(self, positions: Tensor) -> RotaryTables:
        """The rows of `positions`, int64 [num_rows]; used by all layers of a step."""
        return RotaryTables(
            self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        )

    def apply_(self, x: Tensor, tables: RotaryTables) -> None:
        """Rotate x [num_rows, num_heads, head_dim] in place; rows may be strided."""
        swapped = x.roll(self._half, -1)
        x.mul_(tables.cos).addcmul_(swapped, tables.sin)
