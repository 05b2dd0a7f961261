"""The Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

A step is a few large operators a layer over all rows of the plan. The last layer computes its
attention and MLP, and the head its logits, only for rows that are sampled.

With several ranks each holds a share of the heads, of the MLP's columns and of the vocabulary. The
ranks' parts of `o` and `down` are summed, so that every rank goes on with the same hidden state,
and rank 0 collects the logits.

Not known here: checkpoints, block ids, sampling, processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.batch import LayerMarks
from baton.engine.communicator import ROOT, Communicator, SingleCommunicator
from baton.engine.kv_cache import KvPool
from baton.engine.layers.attention import DecodeGroup, PagedAttention
from baton.engine.layers.linear import Linear
from baton.engine.layers.rms_norm import RmsNorm
from baton.engine.layers.rotary import Rotary, RotaryTables
from baton.engine.model_config import ModelConfig
from baton.engine.prompt_scores import SCORED_ROWS
from baton.engine.step_plan import StepPlan

OnScored = Callable[[int, Tensor], None]
"""Called on rank 0 with logits of scored rows, and the number of the first of them among all."""
L = TypeVar("L")
"""What a device multiplies with: `Linear` here, another class on a GPU."""


@dataclass(frozen=True, slots=True)
class LlamaLayer(Generic[L]):
    """One rank's weights of a decoder layer; norm gains and the query scale are folded in."""

    qkv: L
    """Rows: the rank's query heads, its key heads, its value heads."""
    o: L
    """Columns of the rank's query heads; the bias is on rank 0 alone, as in `down`."""
    gate_up: L
    """Rows: gate, then up."""
    down: L


@dataclass(frozen=True, slots=True)
class LlamaWeights(Generic[L]):
    """Everything of the checkpoint that one rank computes with, in run-time form."""

    embedding: Tensor
    """[vocab_size, hidden_size], the same on every rank."""
    layers: list[LlamaLayer[L]]
    head: L
    """The rank's rows of the vocabulary (see ModelShard); the final norm's gain is folded in."""


class LlamaModel:
    """Computes a plan's rows: writes their KV, returns the logits that are wanted."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights[Linear],
        pool: KvPool,
        *,
        max_positions: int,
        device: torch.device,
        communicator: Communicator | None = None,
    ) -> None:
        """`weights` and `pool` are those of the communicator's rank; None: of the only one."""
        self._communicator = communicator or SingleCommunicator()
        num_ranks = self._communicator.size
        num_heads = config.num_heads // num_ranks
        dtype = weights.embedding.dtype
        self._embedding = weights.embedding
        self._layers = weights.layers
        self._head = weights.head
        self._pool = pool
        self._norm = RmsNorm(config.hidden_size, config.rms_norm_eps, device)
        self._attention = PagedAttention(
            pool, group_size=config.group_size, dtype=dtype, device=device
        )
        self._num_rotated = num_heads + pool.num_kv_heads
        self._rotary = Rotary(
            config.rope,
            head_dim=config.head_dim,
            max_positions=max_positions,
            dtype=dtype,
            device=device,
        )
        self._head_dim = config.head_dim
        self._num_heads = num_heads
        self._query_width = num_heads * config.head_dim
        self._vocab_size = config.vocab_size

    def forward(
        self,
        plan: StepPlan,
        marks: LayerMarks | None = None,
        on_scored: OnScored | None = None,
    ) -> Tensor | None:
        """Logits [num sampled rows, vocab_size].

        None when the plan samples nothing, and on all ranks but the first. `on_scored` hears of the
        plan's scored rows, a piece at a time. A layer is passed once
        its sums are there, to which every rank has added after writing its KV.
        """
        hidden = F.embedding(plan.token_ids, self._embedding)
        tables = self._rotary.tables(plan.positions)
        last = len(self._layers) - 1
        for index in range(last):
            layer = self._layers[index]
            queries = self._project(layer, index, hidden, plan, tables)
            attended = self._attend(index, queries, plan)
            hidden = self._combine(layer, hidden, attended)
            if marks is not None:
                marks.pass_layers(index + 1)
        queries = self._project(self._layers[last], last, hidden, plan, tables)
        if marks is not None and self._communicator.size == 1:
            marks.pass_layers(last + 1)
        if plan.scored:
            self._score(hidden, queries, plan, on_scored)
        if not plan.sampled:
            # The others' KV of this layer is in the pool before anyone is told of it. Otherwise
            # the sums that follow see to that.
            self._communicator.barrier()
            return None
        if plan.sampled_rows is not None:
            queries = queries.index_select(0, plan.sampled_rows)
            hidden = hidden.index_select(0, plan.sampled_rows)
        attended = self._decode(last, queries, plan.sampled_groups)
        hidden = self._combine(self._layers[last], hidden, attended)
        if marks is not None and self._communicator.size > 1:
            marks.pass_layers(last + 1)
        logits = self._communicator.gather_columns(self._head(self._norm(hidden)))
        if logits is None or logits.shape[1] == self._vocab_size:
            return logits
        # Each rank holds the same number of rows of the head; what the last ones lack is padding.
        return logits[:, : self._vocab_size]

    def _score(
        self, hidden: Tensor, queries: Tensor, plan: StepPlan, on_scored: OnScored | None
    ) -> None:
        """The last layer and the head for the scored rows; every rank takes part."""
        last = len(self._layers) - 1
        rows = torch.cat([torch.arange(s.first_row, s.first_row + s.num_rows) for s in plan.scored])
        attended = self._attend(last, queries, plan).index_select(0, rows)
        hidden = self._combine(self._layers[last], hidden.index_select(0, rows), attended)
        for first in range(0, len(rows), SCORED_ROWS):
            piece = self._head(self._norm(hidden[first : first + SCORED_ROWS]))
            logits = self._communicator.gather_columns(piece)
            if logits is not None and on_scored is not None:
                on_scored(first, logits)

    def _project(
        self,
        layer: LlamaLayer[Linear],
        index: int,
        hidden: Tensor,
        plan: StepPlan,
        tables: RotaryTables,
    ) -> Tensor:
        """Write the rows' K and V; return their queries [num_rows, num_heads * head_dim]."""
        qkv = layer.qkv(self._norm(hidden))
        heads = qkv.view(hidden.shape[0], -1, self._head_dim)
        self._rotary.apply_(heads[:, : self._num_rotated], tables)
        self._pool.write(plan.slot_rows[index], heads[:, self._num_heads :], index)
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

    def _combine(self, layer: LlamaLayer[Linear], hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: output projection and SwiGLU, each added to the residual."""
        hidden = self._add(hidden, layer.o, attended)
        gate, up = layer.gate_up(self._norm(hidden)).chunk(2, dim=-1)
        return self._add(hidden, layer.down, F.silu(gate).mul_(up))

    def _add(self, residual: Tensor, linear: Linear, x: Tensor) -> Tensor:
        """residual + the sum over all ranks of their part of the product, on every rank."""
        is_root = self._communicator.rank == ROOT
        return self._communicator.all_reduce_(linear.add_to(residual, x) if is_root else linear(x))
