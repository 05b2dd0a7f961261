"""Load a Hugging Face folder into run-time form.

Tensors are read one at a time, folded and fused in float32, converted to the engine's type, laid
out for the processor and dropped, so that one copy of the weights is resident:

    qkv      = [q * gain / sqrt(head_dim); k * gain; v * gain]      gain: input_layernorm
    gate_up  = [gate * gain; up * gain]                             gain: post_attention_layernorm
    head     = (lm_head or embedding) * gain                        gain: final norm

A tensor that is missing, has another shape, or would be left over is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.config import EngineConfig
from baton.engine.layers.linear import Linear, make_linear
from baton.engine.layers.rms_norm import folded_gain
from baton.engine.model_config import ModelConfig, load_model_config
from baton.engine.models.llama import LlamaLayer, LlamaWeights

INDEX_NAME = "model.safetensors.index.json"
FOLDED_ROWS = 4096
"""Rows of a weight that exist in float32 at once while it is folded."""
FINGERPRINT_SAMPLES = 256
"""Pieces of each weight file that enter the model id, beside its size and header."""
FINGERPRINT_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, still without a KV pool."""

    model_config: ModelConfig
    weights: LlamaWeights
    model_id: str
    dtype: str
    max_model_len: int
    """Tokens of prompt and output together."""
    device: torch.device

    def layout(self, block_size: int) -> KvLayout:
        """The KV layout that this model needs."""
        return KvLayout(
            model_id=self.model_id,
            num_layers=self.model_config.num_layers,
            num_kv_heads=self.model_config.num_kv_heads,
            head_dim=self.model_config.head_dim,
            block_size=block_size,
            dtype=self.dtype,
        )


def load_model(config: EngineConfig, *, device: torch.device | None = None) -> LoadedModel:
    """Read config.json and the weights of `config.model_path`. Raises ConfigError."""
    device = device or torch.device("cpu")
    model_config = load_model_config(config.model_path)
    limit = model_config.max_position_embeddings
    if config.max_model_len is not None and not 1 <= config.max_model_len <= limit:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is outside 1..{limit}, the model's own limit"
        )
    files = weight_files(config.model_path)
    with torch.inference_mode():
        weights = _Assembler(model_config, Checkpoint(files), config.dtype, device).assemble()
    return LoadedModel(
        model_config=model_config,
        weights=weights,
        model_id=model_id(config.model_path, files),
        dtype=config.dtype,
        max_model_len=config.max_model_len or limit,
        device=device,
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index when it has one. Raises ConfigError."""
    index = folder / INDEX_NAME
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"no *.safetensors in {folder}; convert the model's weights first")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{INDEX_NAME} has no readable weight_map: {error!r}") from error
    files = [folder / name for name in names]
    for file in files:
        if file.parent != folder or not file.exists():
            raise ConfigError(f"{INDEX_NAME} names {file.name!r}, which is not in the folder")
    return files


def model_id(folder: Path, files: list[Path]) -> str:
    """16 hex digits over config.json and the weights: size, header and evenly spaced samples.

    Independent of time stamps and of the folder's name, and cheap for large models.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, size)))
            for i in range(FINGERPRINT_SAMPLES):
                file.seek(i * size // FINGERPRINT_SAMPLES)
                digest.update(file.read(FINGERPRINT_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class Checkpoint:
    """Named tensors over one or several files; each may be taken once."""

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for path in files:
            with self._open(path) as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))
        self._left = set(self._file_of)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name` in its stored type. Raises ConfigError if absent or misshapen."""
        path = self._file_of.get(name)
        if path is None:
            raise ConfigError(f"the checkpoint has no tensor {name!r}")
        with self._open(path) as file:
            tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, config.json implies {shape}"
            )
        self._left.discard(name)
        return tensor

    def left(self) -> list[str]:
        """Names that nobody took."""
        return sorted(self._left)

    @staticmethod
    def _open(path: Path) -> safe_open:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path.name} is not a readable safetensors file: {error}") from error


class _Assembler:
    """Folds and fuses a Llama checkpoint."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, dtype: str, device: torch.device
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = device

    def assemble(self) -> LlamaWeights:
        c = self._config
        table = self._checkpoint.take("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
        layers = [self._layer(f"model.layers.{i}.") for i in range(c.num_layers)]
        head = (
            table
            if c.tie_word_embeddings
            else self._checkpoint.take("lm_head.weight", tuple(table.shape))
        )
        weights = LlamaWeights(
            embedding=table.to(self._device, self._dtype),
            layers=layers,
            head=make_linear(self._scaled(head, self._gain("model.norm.weight"))),
        )
        self._refuse_leftovers()
        return weights

    def _layer(self, prefix: str) -> LlamaLayer:
        c = self._config
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        width, heads, kv_heads = (
            c.hidden_size,
            c.num_heads * c.head_dim,
            c.num_kv_heads * c.head_dim,
        )
        inner = c.intermediate_size
        scale = 1.0 / math.sqrt(c.head_dim)
        return LlamaLayer(
            qkv=self._fused(
                f"{prefix}input_layernorm.weight",
                [
                    (f"{attention}q_proj", heads, scale),
                    (f"{attention}k_proj", kv_heads, 1.0),
                    (f"{attention}v_proj", kv_heads, 1.0),
                ],
                c.attention_bias,
            ),
            o=self._plain(f"{attention}o_proj", (width, heads), c.attention_bias),
            gate_up=self._fused(
                f"{prefix}post_attention_layernorm.weight",
                [(f"{mlp}gate_proj", inner, 1.0), (f"{mlp}up_proj", inner, 1.0)],
                c.mlp_bias,
            ),
            down=self._plain(f"{mlp}down_proj", (width, inner), c.mlp_bias),
        )

    def _fused(self, norm_name: str, parts: list[tuple[str, int, float]], has_bias: bool) -> Linear:
        """Projections of one normalised input, as one. parts: (name, out_features, scale)."""
        gain = self._gain(norm_name)
        weights, biases = [], []
        for name, rows, scale in parts:
            weight = self._checkpoint.take(f"{name}.weight", (rows, gain.numel()))
            weights.append(self._scaled(weight, gain * scale))
            if has_bias:
                biases.append(self._checkpoint.take(f"{name}.bias", (rows,)).float() * scale)
        return self._linear(torch.cat(weights), torch.cat(biases) if has_bias else None)

    def _plain(self, name: str, shape: tuple[int, int], has_bias: bool) -> Linear:
        weight = self._checkpoint.take(f"{name}.weight", shape)
        bias = self._checkpoint.take(f"{name}.bias", shape[:1]) if has_bias else None
        return self._linear(weight, bias)

    def _gain(self, name: str) -> Tensor:
        return folded_gain(self._checkpoint.take(name, (self._config.hidden_size,)))

    def _scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """weight * factors, rounded once to the engine's type; float32 for a few rows at a time."""
        scaled = torch.empty(weight.shape, dtype=self._dtype, device=self._device)
        pairs = zip(scaled.split(FOLDED_ROWS), weight.split(FOLDED_ROWS), strict=True)
        for target, part in pairs:
            target.copy_(part.float() * factors)
        return scaled

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        weight = weight.to(self._device, self._dtype)
        return make_linear(weight, None if bias is None else bias.to(self._device, self._dtype))

    def _refuse_leftovers(self) -> None:
        """Tensors that would silently not take part; stored copies of derived ones are fine."""
        ignorable = (
            "rotary_emb.inv_freq",
            *(("lm_head.weight",) * self._config.tie_word_embeddings),
        )
        left = [name for name in self._checkpoint.left() if not name.endswith(ignorable)]
        if left:
            raise ConfigError(
                f"the checkpoint holds {len(left)} tensors that {self._config.architecture} does "
                f"not use as configured, the first is {left[0]!r}; "
                "attention_bias and mlp_bias in config.json switch biases on"
            )
