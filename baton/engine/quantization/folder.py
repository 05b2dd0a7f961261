"""Make a quantised model folder from a plain one, at once or not at all.

    check → calibrate on a text (INT4, KV scales) → write tensors, config.json and copies of the
    other files into .<name>.tmp-… → rename to <name>

Gains of the norms before quantised projections are folded into their columns first, and 1 is
stored instead: the run-time folds gains into weights, which quantised ones do not allow. The
embedding, biases and (unless asked for) the head stay as stored. Tensors are handled one at a
time; a file of at most SHARD_BYTES exists in memory before it is written.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.kv_layout import DTYPE_BYTES
from baton.core.quantization import HEAD_NAME, QuantizationConfig, Scheme, quantization_json
from baton.engine.checkpoint import INDEX_NAME, Checkpoint, weight_files
from baton.engine.model_config import ModelConfig, load_model_config
from baton.engine.model_shard import shard_model
from baton.engine.parallel import SINGLE
from baton.engine.quantization.calibration import Calibration, calibrate, load_measured
from baton.engine.quantization.calibration_text import CALIBRATION_TEXT
from baton.engine.quantization.rounding import quantize
from baton.engine.quantization.storage import stored_tensors
from baton.engine.tokenizer import Tokenizer
from baton.engine.weight_assembler import refuse_leftovers

SHARD_BYTES = 2 << 30
NOT_COPIED = ("config.json", INDEX_NAME, "baton_import.json")
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Tokenizer, chat template, generation settings."""


class QuantizeProgress(Protocol):
    """Told how far the work is; called from one thread."""

    def start_stage(self, description: str, total: int | None, *, counts_bytes: bool) -> None:
        """`total` in bytes or in tokens; None when it is not known."""
        ...

    def update(self, completed: int) -> None:
        """`completed` of the current stage, counted from its start."""
        ...


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What was written."""

    source_bytes: int
    """Of all weight files."""
    target_bytes: int


def quantize_folder(
    source: Path,
    target: Path,
    config: QuantizationConfig,
    *,
    calibration_text: str | None = CALIBRATION_TEXT,
    progress: QuantizeProgress,
) -> QuantizeResult:
    """Write `source` as `target` in `config`.

    Without a text INT4 takes all input channels as equally important. Raises ConfigError, and then
    leaves no `target`.
    """
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not, or remove it")
    model_config = load_model_config(source)
    _check(model_config, config, source)
    if config.has_kv_scales and calibration_text is None:
        raise ConfigError("KV scales are measured on a text; give one or leave them out")
    files = weight_files(source)
    calibration = None
    if calibration_text is not None and (config.has_kv_scales or config.scheme is Scheme.INT4):
        calibration = _calibrated(source, calibration_text, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        source_bytes = sum(path.stat().st_size for path in files)
        progress.start_stage("quantise weights", source_bytes, counts_bytes=True)
        checkpoint = Checkpoint(files, lambda done, total: progress.update(done))
        writer = _ShardWriter(scratch)
        importance = calibration.importance if calibration is not None else {}
        for name, tensor in _Converter(checkpoint, model_config, config, importance).tensors():
            writer.add(name, tensor)
        if calibration is not None and config.has_kv_scales:
            for name, tensor in _kv_tensors(calibration).items():
                writer.add(name, tensor)
        target_bytes = writer.finish()
        raw = json.loads((source / "config.json").read_bytes())
        raw["quantization_config"] = quantization_json(config)
        (scratch / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
        _copy_other_files(source, scratch)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return QuantizeResult(source_bytes, target_bytes)


def _check(model_config: ModelConfig, config: QuantizationConfig, source: Path) -> None:
    if model_config.quantization is not None:
        raise ConfigError(
            f"{source} is quantised already ({model_config.quantization.name}); "
            "start from the model in a floating-point type"
        )
    if config.scheme is None and not config.has_kv_scales:
        raise ConfigError("neither weights nor KV are to be quantised; give a scheme or fp8 KV")
    if config.quantizes_head and model_config.tie_word_embeddings:
        raise ConfigError(
            "the head of this model is its embedding (tie_word_embeddings), which stays as it is; "
            "leave the head unquantised"
        )
    shard_model(replace(model_config, quantization=config), SINGLE)


def _calibrated(source: Path, text: str, progress: QuantizeProgress) -> Calibration:
    token_ids = Tokenizer.from_folder(source).encode(text, add_special_tokens=True)
    progress.start_stage("load for calibration", None, counts_bytes=True)
    model = load_measured(source, _stored_dtype(source), lambda done, total: progress.update(done))
    progress.start_stage("calibrate", len(token_ids), counts_bytes=False)
    return calibrate(model, token_ids, on_progress=progress.update)


def _kv_tensors(calibration: Calibration) -> dict[str, Tensor]:
    tensors = {}
    for which, scales in (("k_scale", calibration.k_scale), ("v_scale", calibration.v_scale)):
        for layer, per_head in enumerate(scales):
            name = f"model.layers.{layer}.self_attn.{which}"
            tensors[name] = per_head.view(-1, 1, 1).clone()
    return tensors


def _stored_dtype(source: Path) -> str:
    raw = json.loads((source / "config.json").read_bytes())
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    return str(dtype) if dtype in DTYPE_BYTES else "bfloat16"


class _Converter:
    """All tensors of the quantised folder but KV scales, in the order of the layers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        config: QuantizationConfig,
        importance: Mapping[str, Tensor],
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._config = config
        self._importance = importance

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        model, take = self._model, self._checkpoint.take
        table = (model.vocab_size, model.hidden_size)
        yield "model.embed_tokens.weight", take("model.embed_tokens.weight", table)
        for i in range(model.num_layers):
            yield from self._layer(f"model.layers.{i}.")
        norm = take("model.norm.weight", table[1:])
        if not model.tie_word_embeddings:
            head = take(f"{HEAD_NAME}.weight", table)
            if self._config.quantizes_head:
                yield from self._quantized(HEAD_NAME, head, norm)
                norm = torch.ones_like(norm)
            else:
                yield f"{HEAD_NAME}.weight", head
        yield "model.norm.weight", norm
        refuse_leftovers(self._checkpoint, model)

    def _layer(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        model, take = self._model, self._checkpoint.take
        width, inner = model.hidden_size, model.intermediate_size
        heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        after_norm = {
            "input_layernorm": {
                f"{attention}q_proj": heads,
                f"{attention}k_proj": kv_heads,
                f"{attention}v_proj": kv_heads,
            },
            "post_attention_layernorm": {f"{mlp}gate_proj": inner, f"{mlp}up_proj": inner},
        }
        for norm, projections in after_norm.items():
            gain = take(f"{prefix}{norm}.weight", (width,))
            for name, rows in projections.items():
                yield from self._quantized(name, take(f"{name}.weight", (rows, width)), gain)
            is_folded = self._config.scheme is not None
            yield f"{prefix}{norm}.weight", torch.ones_like(gain) if is_folded else gain
        for name, columns in ((f"{attention}o_proj", heads), (f"{mlp}down_proj", inner)):
            yield from self._quantized(name, take(f"{name}.weight", (width, columns)), None)
        biases: dict[str, int] = {}
        if model.attention_bias:
            biases |= after_norm["input_layernorm"] | {f"{attention}o_proj": width}
        if model.mlp_bias:
            biases |= after_norm["post_attention_layernorm"] | {f"{mlp}down_proj": width}
        for name, rows in biases.items():
            yield f"{name}.bias", take(f"{name}.bias", (rows,))

    def _quantized(
        self, name: str, weight: Tensor, gain: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        """The stored form of a projection of what a norm with `gain` gives."""
        if self._config.scheme is None:
            yield f"{name}.weight", weight
            return
        scale_dtype = torch.float32 if weight.dtype is torch.float32 else torch.bfloat16
        quantized = quantize(
            weight.float() if gain is None else weight.float() * gain.float(),
            self._config,
            scale_dtype=scale_dtype,
            importance=self._importance.get(name),
        )
        for stored_name, tensor in stored_tensors(name, quantized).items():
            is_scale = stored_name.endswith("weight_scale")
            yield stored_name, tensor.to(scale_dtype) if is_scale else tensor


class _ShardWriter:
    """Collects tensors and writes a file whenever SHARD_BYTES are together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._written: list[list[str]] = []
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        # A view of a mapped file holds no other pages than its own.
        self._held[name] = tensor.contiguous()
        self._held_bytes += tensor.nbytes

    def finish(self) -> int:
        """Write what is left and the index; returns the bytes of all files."""
        self._write()
        count = len(self._written)
        mode = self._folder.stat().st_mode & 0o666
        weight_map = {}
        num_bytes = 0
        for i, names in enumerate(self._written):
            one = "model.safetensors"
            file = one if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            path = (self._folder / f"{i}.part").rename(self._folder / file)
            # The library makes files that nobody else may read.
            path.chmod(mode)
            weight_map.update(dict.fromkeys(names, file))
            num_bytes += path.stat().st_size
        if count > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
        return num_bytes

    def _write(self) -> None:
        save_file(self._held, self._folder / f"{len(self._written)}.part", {"format": "pt"})
        self._written.append(sorted(self._held))
        self._num_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0


def _copy_other_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.suffix in COPIED_SUFFIXES and path.name not in NOT_COPIED and path.is_file():
            shutil.copyfile(path, target / path.name)
