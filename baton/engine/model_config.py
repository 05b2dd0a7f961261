"""What a model is, read from the config.json of a Hugging Face folder.

Accepts what `models/llama.py` computes exactly and refuses everything else by name, so that a
checkpoint is never run with a part of it left out. Knows nothing of weights or of tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig, parse_quantization

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
"""Mistral without a sliding window computes the same function as Llama."""


class RopeType(Enum):
    """How rotary frequencies are stretched beyond the context of the first training."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. The last four fields matter to scaled types only."""

    theta: float
    rope_type: RopeType = RopeType.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and options of a Llama-family decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization: QuantizationConfig | None = None
    """None when every tensor is stored in a floating-point type of 16 or 32 bits."""

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Weights and biases, tied embeddings counted once."""
        width, heads = self.hidden_size, self.num_heads + 2 * self.num_kv_heads
        attention = width * heads * self.head_dim + self.num_heads * self.head_dim * width
        mlp = 3 * width * self.intermediate_size
        biases = (heads * self.head_dim + width) * self.attention_bias
        biases += (2 * self.intermediate_size + width) * self.mlp_bias
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + biases + 2 * width) + width + embeddings


def load_model_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json. Raises ConfigError on anything missing or not supported."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"no readable config.json in {folder}: {error.strerror}; "
            "give a Hugging Face folder with config.json and *.safetensors"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"config.json of {folder.name} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config.json of {folder.name} is not a JSON object")
    return parse_model_config(raw)


def parse_model_config(raw: dict[str, Any]) -> ModelConfig:
    """The checked form of a parsed config.json. Raises ConfigError."""
    architecture = _architecture(raw)
    _refuse_unsupported(raw)
    num_heads = _positive(raw, "num_attention_heads")
    hidden_size = _positive(raw, "hidden_size")
    num_kv_heads = _positive(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    head_dim = _positive(raw, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim must be even for rotary embeddings, got {head_dim}")
    max_positions = _positive(raw, "max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        quantization=_quantization(raw),
    )


def _architecture(raw: dict[str, Any]) -> str:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"architecture {architecture!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return str(architecture)


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Options that change the computed function and that the models here do not implement."""
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {raw['hidden_act']!r} is not supported; supported is silu")
    window = raw.get("sliding_window")
    if window is not None and raw.get("use_sliding_window", True):
        raise ConfigError(
            f"sliding_window {window} is not supported; supported is full attention (null)"
        )
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise ConfigError(
            f"layer_types {sorted(set(raw['layer_types']))} are not supported; "
            "supported is full_attention in every layer"
        )


def _quantization(raw: dict[str, Any]) -> QuantizationConfig | None:
    stored = raw.get("quantization_config")
    if not stored:
        return None
    config = parse_quantization(stored)
    if config.quantizes_head and raw.get("tie_word_embeddings", False):
        raise ConfigError(
            "quantization_config covers lm_head, which tie_word_embeddings makes the embedding; "
            "supported is a quantized head of its own"
        )
    return config


def _rope(raw: dict[str, Any], max_positions: int) -> RopeConfig:
    """`rope_parameters` is the present spelling, `rope_theta` + `rope_scaling` the older one."""
    values = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    name = values.get("rope_type", values.get("type", "default"))
    try:
        rope_type = RopeType(name)
    except ValueError:
        supported = ", ".join(t.value for t in RopeType)
        raise ConfigError(
            f"rope type {name!r} is not supported; supported are {supported}"
        ) from None
    partial = values.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    theta = values.get("rope_theta", raw.get("rope_theta", 10000.0))
    if rope_type is RopeType.DEFAULT:
        return RopeConfig(theta=float(theta))
    factor = _number(values, "factor")
    if rope_type is RopeType.LINEAR:
        return RopeConfig(theta=float(theta), rope_type=rope_type, factor=factor)
    low, high = _number(values, "low_freq_factor"), _number(values, "high_freq_factor")
    if not low < high:
        raise ConfigError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    return RopeConfig(
        theta=float(theta),
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_positive(
            values, "original_max_position_embeddings", max_positions
        ),
    )


def _positive(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _number(raw: dict[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)
