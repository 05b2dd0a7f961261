"""Turn checkpoint tensors into the linear layers of one rank.

Tensors are taken one at a time, only the rank's part of each, folded and fused in float32, rounded
to the engine's type on the device and handed to the device's LinearFactory:

    qkv      = [q * gain / sqrt(head_dim); k * gain; v * gain]      gain: input_layernorm
    gate_up  = [gate * gain; up * gain]                             gain: post_attention_layernorm
    head     = (lm_head or embedding) * gain                        gain: final norm

Quantised projections take constant factors into their scales; a gain per input channel does not
fit in there, so it was folded before they were quantised and the stored gain is 1.

A tensor that is missing, has another shape, or would be left over is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.quantization import HEAD_NAME, weight_scheme
from baton.engine.checkpoint import Part, TensorSource
from baton.engine.layers.linear import LinearFactory
from baton.engine.model_config import ModelConfig
from baton.engine.model_shard import ModelShard
from baton.engine.models.llama import LlamaLayer, LlamaWeights
from baton.engine.quantization.storage import take_quantized
from baton.engine.quantization.weight import stacked

FOLDED_ROWS = 4096
"""Rows of a weight that exist in float32 at once while it is folded."""

L = TypeVar("L")


@dataclass(frozen=True, slots=True)
class _Projection:
    """One projection of a fused layer."""

    name: str
    num_rows: int
    """Of the whole model."""
    part: slice
    """The rank's rows."""
    factor: float = 1.0

    @property
    def num_part_rows(self) -> int:
        return len(range(self.num_rows)[self.part])


class WeightAssembler(Generic[L]):
    """Folds and fuses a rank's part of a Llama checkpoint; serves one load."""

    def __init__(
        self,
        config: ModelConfig,
        shard: ModelShard,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        linears: LinearFactory[L],
    ) -> None:
        self._config = config
        self._shard = shard
        self._source = source
        self._dtype = dtype
        self._device = device
        self._linears = linears
        self._gain_factor = linears.gain_factor(config.hidden_size)
        self._quantization = config.quantization if weight_scheme(config.quantization) else None

    def assemble(self) -> LlamaWeights[L]:
        c = self._config
        table_shape = (c.vocab_size, c.hidden_size)
        table = self._source.take("model.embed_tokens.weight", table_shape)
        layers = [self._layer(f"model.layers.{i}.") for i in range(c.num_layers)]
        weights = LlamaWeights(
            embedding=table.to(self._device, self._dtype),
            layers=layers,
            head=self._head(table),
        )
        refuse_leftovers(self._source, c)
        return weights

    def kv_scales(self) -> tuple[Tensor, Tensor]:
        """K and V, each float32 [num_layers, num_kv_heads of the rank]; 1 when none are stored."""
        c = self._config
        pair = []
        is_stored = c.quantization is not None and c.quantization.has_kv_scales
        for which in ("k_scale", "v_scale"):
            scales = torch.ones(c.num_layers, c.num_kv_heads)
            for i in range(c.num_layers if is_stored else 0):
                name = f"model.layers.{i}.self_attn.{which}"
                scales[i] = self._source.take(name, (c.num_kv_heads, 1, 1)).float().view(-1)
            if not bool((scales > 0).all()):
                raise ConfigError(f"the checkpoint's {which} has values that are not positive")
            pair.append(scales[:, self._shard.kv_heads].contiguous().to(self._device))
        return pair[0], pair[1]

    def _layer(self, prefix: str) -> LlamaLayer[L]:
        c, shard = self._config, self._shard
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        queries = _times(shard.query_heads, c.head_dim)
        keys = _times(shard.kv_heads, c.head_dim)
        inner = c.intermediate_size
        return LlamaLayer(
            qkv=self._fused(
                f"{prefix}input_layernorm.weight",
                [
                    _Projection(f"{attention}q_proj", heads, queries, 1.0 / math.sqrt(c.head_dim)),
                    _Projection(f"{attention}k_proj", kv_heads, keys),
                    _Projection(f"{attention}v_proj", kv_heads, keys),
                ],
                c.attention_bias,
            ),
            o=self._summed(f"{attention}o_proj", heads, queries, c.attention_bias),
            gate_up=self._fused(
                f"{prefix}post_attention_layernorm.weight",
                [
                    _Projection(f"{mlp}gate_proj", inner, shard.inner),
                    _Projection(f"{mlp}up_proj", inner, shard.inner),
                ],
                c.mlp_bias,
            ),
            down=self._summed(f"{mlp}down_proj", inner, shard.inner, c.mlp_bias),
        )

    def _fused(self, norm_name: str, projections: list[_Projection], has_bias: bool) -> L:
        """Projections of one normalised input, as one."""
        gain = self._source.take(norm_name, (self._config.hidden_size,)).to(self._device).float()
        bias = self._fused_bias(projections) if has_bias else None
        if self._quantization is not None:
            self._check_folded(norm_name, gain)
            return self._fused_quantized(projections, bias)
        num_rows = sum(p.num_part_rows for p in projections)
        fused = torch.empty(num_rows, gain.numel(), dtype=self._dtype, device=self._device)
        first = 0
        for p in projections:
            weight = self._source.take(
                f"{p.name}.weight", (p.num_rows, gain.numel()), part=self._part(p.part)
            )
            target = fused[first : first + p.num_part_rows]
            self._fold(target, weight, gain * (self._gain_factor * p.factor))
            first += p.num_part_rows
        return self._linears.plain(fused, bias)

    def _fused_quantized(self, projections: list[_Projection], bias: Tensor | None) -> L:
        assert self._quantization is not None
        width = self._config.hidden_size
        parts = [
            take_quantized(
                self._source,
                p.name,
                (p.num_rows, width),
                self._quantization,
                part=(p.part, slice(None)),
                device=self._device,
            ).scaled(self._gain_factor * p.factor)
            for p in projections
        ]
        return self._linears.quantized(stacked(parts), bias)

    def _fused_bias(self, projections: list[_Projection]) -> Tensor:
        biases = [
            self._source.take(f"{p.name}.bias", (p.num_rows,), part=self._part(p.part))
            .to(self._device)
            .float()
            .mul(p.factor)
            for p in projections
        ]
        return torch.cat(biases).to(self._dtype)

    def _summed(self, name: str, width: int, part: slice, has_bias: bool) -> L:
        """A projection whose ranks' results are summed, so that one rank alone adds the bias."""
        shape = (self._config.hidden_size, width)
        bias = None
        if has_bias:
            stored = self._source.take(f"{name}.bias", shape[:1])
            if self._shard.parallel.tp_rank == 0:
                bias = stored.to(self._device, self._dtype, copy=True)
        columns = (slice(None), part)
        if self._quantization is not None:
            weight = take_quantized(
                self._source, name, shape, self._quantization, part=columns, device=self._device
            )
            return self._linears.quantized(weight, bias)
        plain = self._source.take(
            f"{name}.weight",
            shape,
            part=None if self._shard.parallel.is_single else columns,
        )
        return self._linears.plain(plain.to(self._device, self._dtype).contiguous(), bias)

    def _head(self, table: Tensor) -> L:
        """`table` is the whole embedding, which is the head too when they are tied."""
        c, shard = self._config, self._shard
        shape = (c.vocab_size, c.hidden_size)
        gain = self._source.take("model.norm.weight", shape[1:]).to(self._device).float()
        num_rows = len(range(c.vocab_size)[shard.vocab])
        if self._quantization is not None and self._quantization.quantizes_head:
            self._check_folded("model.norm.weight", gain)
            part = (shard.vocab, slice(None))
            weight = take_quantized(
                self._source, "lm_head", shape, self._quantization, part=part, device=self._device
            )
            padded = weight.padded_rows(shard.vocab_rows).scaled(self._gain_factor)
            return self._linears.quantized(padded, None)
        head = torch.empty(shard.vocab_rows, shape[1], dtype=self._dtype, device=self._device)
        head[num_rows:] = 0
        rows = (
            table[shard.vocab]
            if c.tie_word_embeddings
            else self._source.take("lm_head.weight", shape, part=self._part(shard.vocab))
        )
        self._fold(head[:num_rows], rows, gain * self._gain_factor)
        return self._linears.plain(head, None)

    def _part(self, rows: slice) -> Part | None:
        """Whole tensors are asked for as such."""
        return None if self._shard.parallel.is_single else (rows,)

    def _fold(self, target: Tensor, weight: Tensor, factors: Tensor) -> None:
        """target = weight * factors, rounded once; float32 for a few rows at a time."""
        if target.shape[0] == 0:
            return
        pairs = zip(target.split(FOLDED_ROWS), weight.split(FOLDED_ROWS), strict=True)
        for rows, part in pairs:
            rows.copy_(part.to(self._device).float() * factors)

    def _check_folded(self, name: str, gain: Tensor) -> None:
        if not bool((gain == 1).all()):
            raise ConfigError(
                f"{name} is not 1 throughout, and a gain cannot be folded into quantised "
                "weights; quantise the original model with `baton model quantize`, which folds it"
            )


def refuse_leftovers(source: TensorSource, config: ModelConfig) -> None:
    """Raises ConfigError for tensors that would silently not take part.

    Called when all others have been taken; stored copies of derived ones are fine.
    """
    ignorable = (
        "rotary_emb.inv_freq",
        *((f"{HEAD_NAME}.weight",) * config.tie_word_embeddings),
    )
    left = [name for name in source.left() if not name.endswith(ignorable)]
    if left:
        raise ConfigError(
            f"the checkpoint holds {len(left)} tensors that {config.architecture} does not use as "
            f"configured, the first is {left[0]!r}; attention_bias and mlp_bias in config.json "
            "switch biases on"
        )


def _times(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)
