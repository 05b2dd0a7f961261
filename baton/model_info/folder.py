"""Read a Hugging Face folder's shape: config.json and the headers of the weight files.

Weights are never loaded. Does not know: machines, costs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from baton.core.errors import ConfigError
from baton.core.kv_layout import DTYPE_BYTES
from baton.core.quantization import (
    WORD_BITS,
    QuantizationConfig,
    parse_quantization,
    weight_scheme,
)

MAX_HEADER_BYTES = 100 << 20
"""The limit of the format's reference reader; a longer header is no safetensors file."""


class Component(Enum):
    """A part of the model, in the order in which it is printed."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    NORMS = "norms"
    HEAD = "head"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as its folder describes it."""

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int | None
    is_tied: bool
    """The output head uses the embedding's weights."""
    dtype: str
    params: Mapping[Component, int]
    """Stored parameters; a tied head has none of its own."""
    component_bytes: Mapping[Component, int]
    """In the types they are stored in, scales of quantised weights included."""
    quantization: QuantizationConfig | None
    sliding_window: int | None

    @property
    def stored_bytes(self) -> int:
        """Of all tensors."""
        return sum(self.component_bytes.values())

    @property
    def num_params(self) -> int:
        return sum(self.params.values())


class StoredTensor(NamedTuple):
    name: str
    num_elements: int
    num_bytes: int


def read_shape(folder: Path) -> ModelShape:
    """Raises ConfigError when the folder is not that of a dense decoder model."""
    config = _read_config(folder)
    quantization = _quantization(config)
    params = dict.fromkeys(Component, 0)
    component_bytes = dict.fromkeys(Component, 0)
    for tensor in _stored_tensors(folder):
        params[component_of(tensor.name)] += _num_params(tensor, quantization)
        component_bytes[component_of(tensor.name)] += tensor.num_bytes
    num_heads = _required_int(config, "num_attention_heads")
    hidden_size = _required_int(config, "hidden_size")
    return ModelShape(
        name=folder.resolve().name,
        model_type=str(config.get("model_type", "unknown")),
        num_layers=_required_int(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_optional_int(config, "num_key_value_heads") or num_heads,
        head_dim=_optional_int(config, "head_dim") or hidden_size // num_heads,
        vocab_size=_required_int(config, "vocab_size"),
        max_position_embeddings=_optional_int(config, "max_position_embeddings"),
        is_tied=not params[Component.HEAD],
        dtype=_dtype(config),
        params=params,
        component_bytes=component_bytes,
        quantization=quantization,
        sliding_window=_optional_int(config, "sliding_window"),
    )


def component_of(name: str) -> Component:
    """By the Hugging Face name of a tensor."""
    if "norm" in name:
        return Component.NORMS
    if ".self_attn." in name:
        return Component.ATTENTION
    if ".mlp." in name:
        return Component.MLP
    if "embed_tokens" in name:
        return Component.EMBEDDING
    return Component.HEAD if name.startswith("lm_head.") else Component.OTHER


def _quantization(config: Mapping[str, Any]) -> QuantizationConfig | None:
    stored = config.get("quantization_config")
    return parse_quantization(stored) if stored else None


def _num_params(tensor: StoredTensor, quantization: QuantizationConfig | None) -> int:
    """Weights of the model that a tensor holds: scales are none, a packed word is several."""
    if tensor.name.endswith((".weight_scale", ".weight_shape", ".k_scale", ".v_scale")):
        return 0
    if not tensor.name.endswith(".weight_packed"):
        return tensor.num_elements
    scheme = weight_scheme(quantization)
    if scheme is None:
        raise ConfigError(f"{tensor.name} is packed, but config.json has no quantization_config")
    return tensor.num_elements * (WORD_BITS // scheme.num_bits)


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{folder} has no readable config.json ({error.strerror}); name a Hugging Face model "
            "folder, or make one with `baton model import`"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(config).__name__}")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise ConfigError(
                f"{file} describes a mixture of experts ({key} = {config[key]}); the cost "
                "formulas hold for dense models only"
            )
    return config


def _required_int(config: Mapping[str, Any], key: str) -> int:
    value = _optional_int(config, key)
    if value is None:
        raise ConfigError(f"config.json has no {key}; is this a decoder language model?")
    return value


def _optional_int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"config.json: {key} must be a positive number, got {value!r}")
    return value


def _dtype(config: Mapping[str, Any]) -> str:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"config.json: dtype {dtype!r} is not one of {sorted(DTYPE_BYTES)}")
    return dtype


def _stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no *.safetensors file; download or import the weights")
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield StoredTensor(name, math.prod(entry["shape"]), end - begin)


def _header(file: Path) -> Mapping[str, Any]:
    """Source: https://github.com/huggingface/safetensors#format"""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ConfigError(f"{file} is not a safetensors file: header of {length} bytes")
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise ConfigError(f"{file} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{file} is not a safetensors file: its header is no object")
    return header
