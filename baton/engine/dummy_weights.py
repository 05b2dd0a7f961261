"""Random tensors in the shapes of config.json, made where they will be used, for benchmarks.

A tensor taken whole is the same on every rank, by its name; a part of one is random numbers of its
own, and so are the same tensor's on a CPU and on a GPU, whose generators differ. The values keep
activations finite; the model says nothing sensible.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from baton.core.quantization import WORD_BITS, Scheme, weight_scheme
from baton.engine.checkpoint import FLOAT_TYPES, LoadProgress, Part
from baton.engine.model_config import ModelConfig

STANDARD_DEVIATION = 0.02
"""Of every weight; the usual initialisation of models of this family."""
NUMBER_DEVIATIONS = {
    Scheme.FP8: 1.0,
    Scheme.FP8_WEIGHT: 1.0,
    Scheme.INT8: 73.9,
    Scheme.INT4: 4.61,
}
"""Of a quantised weight's numbers before scaling: normal for e4m3, evenly spread integers."""


class DummyCheckpoint:
    """Implements TensorSource: every tensor asked for exists. Gains and KV scales are 1."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        on_progress: LoadProgress | None = None,
    ) -> None:
        self._scheme = weight_scheme(config.quantization)
        self._device = device
        self._dtype = dtype
        self._total_bytes = config.num_parameters * dtype.itemsize
        self._done_bytes = 0
        self._on_progress = on_progress

    def has(self, name: str) -> bool:
        return not name.endswith(".weight_shape")

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        part: Part | None = None,
        dtypes: Sequence[torch.dtype] = FLOAT_TYPES,
    ) -> Tensor:
        """See TensorSource. Floating-point tensors come in the engine's type."""
        dtype = self._dtype if self._dtype in dtypes else dtypes[0]
        tensor = torch.empty(
            shape if part is None else _part_shape(shape, part), dtype=dtype, device=self._device
        )
        generator = torch.Generator(self._device)
        generator.manual_seed(_seed(name, part))
        if name.endswith(("norm.weight", ".k_scale", ".v_scale")):
            tensor.fill_(1.0)
        elif name.endswith(".weight_scale"):
            tensor.fill_(self._scale())
        elif dtype in (torch.int8, torch.int32):
            limits = torch.iinfo(dtype)
            tensor.random_(limits.min, limits.max, generator=generator)
        elif dtype is torch.float8_e4m3fn:
            normal = torch.empty(tensor.shape, dtype=torch.bfloat16, device=self._device)
            tensor.copy_(normal.normal_(generator=generator))
        else:
            tensor.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        if not name.endswith("_scale"):
            per_word = WORD_BITS // self._scheme_bits() if dtype is torch.int32 else 1
            self._tell(math.prod(shape) * per_word)
        return tensor

    def left(self) -> list[str]:
        return []

    def _scale(self) -> float:
        """What gives a quantised weight the same deviation as a plain one."""
        return STANDARD_DEVIATION / NUMBER_DEVIATIONS[self._scheme] if self._scheme else 1.0

    def _scheme_bits(self) -> int:
        return self._scheme.num_bits if self._scheme else WORD_BITS

    def _tell(self, num_parameters: int) -> None:
        done = self._done_bytes + num_parameters * self._dtype.itemsize
        self._done_bytes = min(done, self._total_bytes)
        if self._on_progress is not None:
            self._on_progress(self._done_bytes, self._total_bytes)


def dummy_model_id(folder: Path) -> str:
    """16 hex digits over config.json."""
    digest = hashlib.sha256((folder / "config.json").read_bytes() + b"dummy")
    return digest.hexdigest()[:16]


def _seed(name: str, part: Part | None) -> int:
    starts = [] if part is None else [piece.start or 0 for piece in part]
    return int.from_bytes(hashlib.sha256(f"{name}{starts}".encode()).digest()[:4], "little")


def _part_shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    sizes = [len(range(n)[piece]) for n, piece in zip(shape, part, strict=False)]
    return (*sizes, *shape[len(part) :])
