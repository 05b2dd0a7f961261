"""The Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

A step is a few large operators a layer over all rows of the plan. The last layer computes its
attention and MLP, and the head its logits, only for rows that are sampled.

Not known here: checkpoints, block ids, sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.kv_cache import KvPool
from baton.engine.layers.attention import DecodeGroup, PagedAttention
from baton.engine.layers.linear import Linear
from baton.engine.layers.rms_norm import RmsNorm
from baton.engine.layers.rotary import Rotary, RotaryTables
from baton.engine.model_config import ModelConfig
from baton.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """The weights of one decoder layer; norm gains and the query scale are folded in."""

    qkv: Linear
    """Rows: all query heads, all key heads, all value heads."""
    o: Linear
    gate_up: Linear
    """Rows: gate, then up."""
    down: Linear


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """Everything that was in the checkpoint, in run-time form."""

    embedding: Tensor
    """[vocab_size, hidden_size]"""
    layers: list[LlamaLayer]
    head: Linear
    """The final norm's gain is folded in."""


class LlamaModel:
    """Computes a plan's rows: writes their KV, returns the logits that are wanted."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        pool: KvPool,
        *,
        max_positions: int,
        device: torch.device,
    ) -> None:
        dtype = weights.embedding.dtype
        self._embedding = weights.embedding
        self._layers = weights.layers
        self._head = weights.head
        self._pool = pool
        self._norm = RmsNorm(config.hidden_size, config.rms_norm_eps, device)
        self._attention = PagedAttention(
            pool, group_size=config.group_size, dtype=dtype, device=device
        )
        self._num_rotated = config.num_heads + config.num_kv_heads
        self._rotary = Rotary(
            config.rope,
            head_dim=config.head_dim,
            max_positions=max_positions,
            dtype=dtype,
            device=device,
        )
        self._head_dim = config.head_dim
        self._num_heads = config.num_heads
        self._query_width = config.num_heads * config.head_dim

    def forward(self, plan: StepPlan) -> Tensor | None:
        """Logits [num sampled rows, vocab_size], or None when the plan samples nothing."""
        hidden = F.embedding(plan.token_ids, self._embedding)
        tables = self._rotary.tables(plan.positions)
        last = len(self._layers) - 1
        for index in range(last):
            layer = self._layers[index]
            queries = self._project(layer, index, hidden, plan, tables)
            attended = self._attend(index, queries, plan)
            hidden = self._combine(layer, hidden, attended)
        queries = self._project(self._layers[last], last, hidden, plan, tables)
        if not plan.sampled:
            return None
        if plan.sampled_rows is not None:
            queries = queries.index_select(0, plan.sampled_rows)
            hidden = hidden.index_select(0, plan.sampled_rows)
        attended = self._decode(last, queries, plan.sampled_groups)
        hidden = self._combine(self._layers[last], hidden, attended)
        return self._head(self._norm(hidden))

    def _project(
        self, layer: LlamaLayer, index: int, hidden: Tensor, plan: StepPlan, tables: RotaryTables
    ) -> Tensor:
        """Write the rows' K and V; return their queries [num_rows, num_heads * head_dim]."""
        qkv = layer.qkv(self._norm(hidden))
        heads = qkv.view(hidden.shape[0], -1, self._head_dim)
        self._rotary.apply_(heads[:, : self._num_rotated], tables)
        self._pool.write(plan.slot_rows[index], heads[:, self._num_heads :])
        return qkv[:, : self._query_width]

    def _attend(self, index: int, queries: Tensor, plan: StepPlan) -> Tensor:
        if not plan.prefill_chunks:
            return self._decode(index, queries, plan.decode_groups)
        attended = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        if plan.decode_groups:
            num_rows = plan.num_decode_rows
            attended[:num_rows] = self._decode(index, queries[:num_rows], plan.decode_groups)
        for chunk in plan.prefill_chunks:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
            self._attention.prefill(chunk, index, queries[rows], attended[rows])
        return attended

    def _decode(self, index: int, queries: Tensor, groups: list[DecodeGroup]) -> Tensor:
        if len(groups) == 1:
            return self._attention.decode(groups[0], index, queries)
        parts = [
            self._attention.decode(g, index, queries[g.first_row : g.first_row + g.num_seqs])
            for g in groups
        ]
        return torch.cat(parts)

    def _combine(self, layer: LlamaLayer, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: output projection and SwiGLU, each added to the residual."""
        hidden = layer.o.add_to(hidden, attended)
        gate, up = layer.gate_up(self._norm(hidden)).chunk(2, dim=-1)
        return layer.down.add_to(hidden, F.silu(gate).mul_(up))
