"""What a text says of a model: which input channels matter, and how large keys and values become.

The model computes the text once, in windows, with its weights as they are. INT4 scales weigh the
error of an input channel by the channel's mean square (`Calibration.importance`); the scales of an
FP8 KV cache follow the largest key and value of each head.

Sources: Frantar et al., "GPTQ", 2022, https://arxiv.org/abs/2210.17323, equation 1: the error of a
projection is a quadratic form of the inputs' second moments, of which the diagonal is taken here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.quantization import HEAD_NAME
from baton.engine.checkpoint import LoadProgress
from baton.engine.config import EngineConfig
from baton.engine.layers.linear import CpuLinears, Linear
from baton.engine.quantization.dense_forward import last_hidden
from baton.engine.quantization.rounding import FP8_MAX
from baton.engine.quantization.weight import QuantizedWeight
from baton.engine.weights import LoadedModel, load_model

WINDOW_TOKENS = 512
KV_MARGIN = 2.0
"""Other texts may reach further than this one. e4m3 has 3 significant bits whatever the scale, and
a factor of 2 costs one of the 15 powers of two below the largest, so the room is nearly free;
what exceeds it is clipped."""
MIN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured on one text."""

    k_scale: Tensor
    """float32 [num_layers, num_kv_heads]: stored number * scale = key."""
    v_scale: Tensor
    importance: Mapping[str, Tensor]
    """Projection -> mean square of each of its input channels, float32 [in_features]. Of those
    behind a norm: of the input before the norm's gain, in an unspecified common unit."""


class MeasuringLinear:
    """A linear layer that sums the squares of its inputs."""

    __slots__ = ("_linear", "_num_rows", "_squares")

    def __init__(self, linear: Linear, in_features: int) -> None:
        self._linear = linear
        self._num_rows = 0
        self._squares = torch.zeros(in_features)

    def __call__(self, x: Tensor) -> Tensor:
        self.measure(x)
        return self._linear(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        self.measure(x)
        return self._linear.add_to(residual, x)

    def measure(self, x: Tensor) -> None:
        """x [num_rows, in_features]"""
        self._num_rows += x.shape[0]
        self._squares = self._squares + x.float().square().sum(0)

    @property
    def mean_squares(self) -> Tensor:
        return self._squares / max(1, self._num_rows)


class MeasuringLinears:
    """The LinearFactory of the CPU engine, its layers measured."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._linears = CpuLinears(dtype)

    def plain(self, weight: Tensor, bias: Tensor | None) -> MeasuringLinear:
        return MeasuringLinear(self._linears.plain(weight, bias), weight.shape[1])

    def quantized(self, weight: QuantizedWeight, bias: Tensor | None) -> MeasuringLinear:
        return MeasuringLinear(self._linears.quantized(weight, bias), weight.shape[1])

    def gain_factor(self, hidden_size: int) -> float:
        return self._linears.gain_factor(hidden_size)


class _LargestKv:
    """A KvTap that keeps the largest magnitude of each head."""

    def __init__(self, num_layers: int, num_kv_heads: int) -> None:
        self.keys = torch.zeros(num_layers, num_kv_heads)
        self.values = torch.zeros(num_layers, num_kv_heads)

    def __call__(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for kept, x in ((self.keys, keys), (self.values, values)):
            kept[layer] = torch.maximum(kept[layer], x.float().abs().amax(dim=(0, 2)))
        return keys, values


def load_measured(
    folder: Path, dtype: str, on_progress: LoadProgress
) -> LoadedModel[MeasuringLinear]:
    """A plain folder, to be calibrated once. Raises ConfigError."""
    return load_model(
        EngineConfig(model_path=folder, dtype=dtype),
        linears=MeasuringLinears(getattr(torch, dtype)),
        on_progress=on_progress,
    )


def calibrate(
    model: LoadedModel[MeasuringLinear],
    token_ids: Sequence[int],
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Compute the text `token_ids`; `on_progress` gets the tokens done.

    Raises ConfigError for a text of fewer than MIN_TOKENS tokens or one that overflows.
    """
    if len(token_ids) < MIN_TOKENS:
        raise ConfigError(
            f"the calibration text has {len(token_ids)} tokens; give one of at least {MIN_TOKENS}"
        )
    c = model.model_config
    largest = _LargestKv(c.num_layers, c.num_kv_heads)
    window = min(WINDOW_TOKENS, model.max_model_len)
    for first in range(0, len(token_ids), window):
        tokens = torch.tensor(token_ids[first : first + window])
        model.weights.head.measure(last_hidden(model, tokens, kv_tap=largest))
        on_progress(first + len(tokens))
    importance = {HEAD_NAME: model.weights.head.mean_squares}
    for i, layer in enumerate(model.weights.layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for names, linear in (
            ([f"{attention}{part}_proj" for part in "qkv"], layer.qkv),
            ([f"{attention}o_proj"], layer.o),
            ([f"{mlp}gate_proj", f"{mlp}up_proj"], layer.gate_up),
            ([f"{mlp}down_proj"], layer.down),
        ):
            importance |= dict.fromkeys(names, linear.mean_squares)
    if not all(bool(torch.isfinite(squares).all()) for squares in importance.values()):
        raise ConfigError("activations of the calibration text are not finite")
    return Calibration(_kv_scale(largest.keys), _kv_scale(largest.values), importance)


def _kv_scale(largest: Tensor) -> Tensor:
    return torch.where(largest == 0, 1.0, largest * (KV_MARGIN / FP8_MAX))
