"""A quantised matrix in memory: its numbers, its scales, and what may be cut out of it.

    weight[n, k] = number[n, k] * scale[n]                        FP8, FP8_WEIGHT, INT8
    weight[n, k] = number[n, k] * scale[n, k // group_size]       INT4

Not known here: how scales are chosen, files, kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.quantization import Scheme

INT4_PER_BYTE = 2
INT4_OFFSET = 8
DEQUANTIZED_ROWS = 4096
"""Rows that exist in float32 at once while a matrix is dequantised."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """[out_features, in_features] in a scheme."""

    scheme: Scheme
    data: Tensor
    """FP8, FP8_WEIGHT: float8_e4m3fn [out, in]. INT8: int8 [out, in]. INT4: uint8 [out, in / 2];
    input channel 2i is in the low half of byte i, 2i + 1 in the high half, each as number + 8."""
    scale: Tensor
    """float32; [out], for INT4 [out, in / group_size]."""
    group_size: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        rows, width = self.data.shape
        return rows, width * (INT4_PER_BYTE if self.scheme is Scheme.INT4 else 1)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def scaled(self, factor: float) -> QuantizedWeight:
        """The matrix times `factor`, which goes into the scales."""
        return replace(self, scale=self.scale * factor)

    def rows(self, part: slice) -> QuantizedWeight:
        return replace(self, data=self.data[part], scale=self.scale[part])

    def columns(self, part: slice) -> QuantizedWeight:
        """Raises ConfigError when INT4 groups would be cut."""
        if self.group_size is None:
            return replace(self, data=self.data[:, part].contiguous())
        start, stop, _ = part.indices(self.shape[1])
        if start % self.group_size or stop % self.group_size:
            raise ConfigError(
                f"columns {start}..{stop} cut groups of {self.group_size}; "
                "take a smaller group size or tp_size"
            )
        data = self.data[:, start // INT4_PER_BYTE : stop // INT4_PER_BYTE]
        scale = self.scale[:, start // self.group_size : stop // self.group_size]
        return replace(self, data=data.contiguous(), scale=scale.contiguous())

    def padded_rows(self, num_rows: int) -> QuantizedWeight:
        """With zero rows below, up to `num_rows`."""
        missing = num_rows - self.shape[0]
        if missing == 0:
            return self
        zero = (INT4_OFFSET << 4 | INT4_OFFSET) if self.scheme is Scheme.INT4 else 0
        data = self.data.view(torch.uint8)
        below = data.new_full((missing, data.shape[1]), zero)
        scale = self.scale.new_zeros((missing, *self.scale.shape[1:]))
        return replace(
            self,
            data=torch.cat((data, below)).view(self.data.dtype),
            scale=torch.cat((self.scale, scale)),
        )

    def numbers(self) -> Tensor:
        """The stored numbers without scales, [out, in]: e4m3, or int8 for INT8 and INT4."""
        if self.scheme is not Scheme.INT4:
            return self.data
        halves = torch.stack((self.data & 15, self.data >> 4), dim=-1)
        return halves.flatten(-2).view(torch.int8) - INT4_OFFSET

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[out, in], rounded once from float32; float32 for a few rows at a time."""
        result = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        for first in range(0, self.shape[0], DEQUANTIZED_ROWS):
            part = self.rows(slice(first, first + DEQUANTIZED_ROWS))
            groups = part.scale.shape[1] if part.scale.ndim == 2 else 1
            values = part.numbers().float().view(part.shape[0], groups, -1)
            values *= part.scale.view(part.shape[0], groups, 1)
            result[first : first + part.shape[0]] = values.flatten(1)
        return result


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of all parts, which have the same scheme, one below the other."""
    if len(parts) == 1:
        return parts[0]
    data = [part.data.view(torch.uint8) for part in parts]
    return replace(
        parts[0],
        data=torch.cat(data).view(parts[0].data.dtype),
        scale=torch.cat([part.scale for part in parts]),
    )
