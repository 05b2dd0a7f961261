"""The Llama family on one GPU rank, as a chain of fused kernels.

    embed ─► per layer: qkv (norm inside) ─► rotate, write KV, attend ─► o (+ residual)
                        ─► gate_up (norm and SwiGLU inside) ─► down (+ residual) ─► head

In a decode step rotation, KV write and attention are one kernel; with chunks they are three.

The residual stream is one buffer that `o` and `down` add to. With several ranks each holds a
share of the heads and of the MLP; rank 0 adds the residual to its partial sum, so that the
all-reduce leaves the new residual on every rank. The last layer computes attention and MLP for
sampled rows only. Nothing here waits for the device, so a decode step can be captured.

Not known here: checkpoints, sampling, graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from baton.engine.communicator import Communicator
from baton.engine.gpu.inputs import StepInputs
from baton.engine.gpu.kv_pool import GpuKvPool
from baton.engine.gpu.linear import GpuLinear
from baton.engine.layers.rotary import inverse_frequencies
from baton.engine.model_config import ModelConfig
from baton.engine.models.llama import LlamaWeights, OnScored
from baton.engine.prompt_scores import SCORED_ROWS
from kernels.decode_attention import decode_attention, decode_workspace
from kernels.embedding import embed
from kernels.fused_decode_attention import fused_decode_attention
from kernels.prefill_attention import prefill_attention
from kernels.rope_kv_write import rope_kv_write

OnLayers = Callable[[int], None]
"""Called when the layers up to here have been launched, on all ranks as far as their KV goes."""


class GpuLlama:
    """Computes a step's rows: writes their KV, returns the logits that are wanted."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights[GpuLinear],
        pool: GpuKvPool,
        communicator: Communicator,
        *,
        max_positions: int,
        max_num_seqs: int,
        vocab_rows: int,
        is_pdl: bool,
    ) -> None:
        """`max_num_seqs` of one step; `vocab_rows`: logits of this rank. `is_pdl`: kernels start
        while the one before ends."""
        self._embedding = weights.embedding
        self._layers = weights.layers
        self._head = weights.head
        self._pool = pool
        self._communicator = communicator
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._num_heads = config.num_heads // communicator.size
        self._query_width = self._num_heads * config.head_dim
        self._vocab_rows = vocab_rows
        self._is_pdl = is_pdl
        self._workspace = decode_workspace(
            (max_num_seqs, self._num_heads, config.head_dim),
            pool.blocks,
        )
        self._cos_sin = _cos_sin_table(config, max_positions, weights.embedding.device)

    def logits_buffer(self, num_rows: int) -> Tensor:
        """Memory for `forward` to leave the logits of a decode step in."""
        table = self._embedding
        return torch.empty(num_rows, self._vocab_rows, dtype=table.dtype, device=table.device)

    def forward(
        self,
        inputs: StepInputs,
        last_tokens: Tensor,
        logits: Tensor | None = None,
        on_layers: OnLayers | None = None,
        on_scored: OnScored | None = None,
    ) -> Tensor | None:
        """Logits [num_sampled, vocab_rows], None when the step samples nothing.

        `last_tokens` [num_slots] holds the samples that pending rows refer to. `logits`, if given,
        receives them. `on_layers` is called in steps with chunks, `on_scored` for scored rows.
        """
        hidden = embed(
            inputs.token_ids,
            self._embedding,
            pending_index=inputs.pending_index,
            last_tokens=last_tokens,
            launch_pdl=self._is_pdl,
        )
        if inputs.sampled_rows is None:
            return self._decode_step(hidden, inputs, logits)
        return self._mixed_step(hidden, inputs, inputs.sampled_rows, logits, on_layers, on_scored)

    def _decode_step(self, hidden: Tensor, inputs: StepInputs, logits: Tensor | None) -> Tensor:
        """Every row is a sequence's single new token, and is sampled."""
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv.project(hidden, rms_eps=self._eps)
            k_scale, v_scale = self._pool.scales(index)
            attended = fused_decode_attention(
                qkv,
                inputs.positions,
                self._cos_sin,
                self._pool.blocks,
                inputs.slot_mapping,
                inputs.block_tables,
                inputs.seq_lens,
                layer=index,
                num_heads=self._num_heads,
                k_scale=k_scale,
                v_scale=v_scale,
                workspace=self._workspace,
                launch_pdl=self._is_pdl,
            )
            self._combine(index, hidden, attended)
        return self._head.project(hidden, rms_eps=self._eps, out=logits)

    def _mixed_step(
        self,
        hidden: Tensor,
        inputs: StepInputs,
        sampled_rows: Tensor,
        logits: Tensor | None,
        on_layers: OnLayers | None,
        on_scored: OnScored | None,
    ) -> Tensor | None:
        """Single tokens and chunks; the last layer goes on with the sampled rows alone."""
        last = len(self._layers) - 1
        # Rows of padding are written by no layer: they stay zero.
        attended = hidden.new_zeros(hidden.shape[0], self._num_heads, self._head_dim)
        for index in range(last):
            queries = self._project(index, hidden, inputs)
            self._attend(index, queries, inputs, attended)
            self._combine(index, hidden, attended)
            if on_layers is not None:
                # Its sums come after every rank's KV.
                on_layers(index + 1)
        queries = self._project(last, hidden, inputs)
        if on_layers is not None and self._communicator.size == 1:
            on_layers(last + 1)
        if inputs.scored_rows is not None:
            self._attend(last, queries, inputs, attended)
            self._score(hidden, attended, inputs.scored_rows, on_scored)
        if not inputs.num_sampled:
            # Rank 0's end of the step must mean that every rank has written its last layer.
            self._communicator.barrier()
            return None
        attended = self._decode(
            last,
            queries.index_select(0, sampled_rows),
            inputs.block_tables.index_select(0, inputs.sampled_seqs),
            inputs.seq_lens.index_select(0, inputs.sampled_seqs),
        )
        hidden = hidden.index_select(0, sampled_rows)
        self._combine(last, hidden, attended)
        if on_layers is not None and self._communicator.size > 1:
            on_layers(last + 1)
        return self._head.project(hidden, rms_eps=self._eps, out=logits)

    def _score(
        self, hidden: Tensor, attended: Tensor, rows: Tensor, on_scored: OnScored | None
    ) -> None:
        """The last layer and the head for the scored rows; every rank takes part."""
        hidden = hidden.index_select(0, rows)
        self._combine(len(self._layers) - 1, hidden, attended.index_select(0, rows))
        for first in range(0, len(rows), SCORED_ROWS):
            piece = hidden[first : first + SCORED_ROWS]
            logits = self._communicator.gather_columns(self._head.project(piece, rms_eps=self._eps))
            if logits is not None and on_scored is not None:
                on_scored(first, logits)

    def _project(self, index: int, hidden: Tensor, inputs: StepInputs) -> Tensor:
        """Write the rows' K and V; return rotated queries [num_rows, num_heads, head_dim]."""
        qkv = self._layers[index].qkv.project(hidden, rms_eps=self._eps)
        k_scale, v_scale = self._pool.scales(index)
        rope_kv_write(
            qkv,
            inputs.positions,
            self._cos_sin,
            self._pool.blocks,
            inputs.slot_mapping,
            layer=index,
            num_heads=self._num_heads,
            k_scale=k_scale,
            v_scale=v_scale,
            launch_pdl=self._is_pdl,
        )
        return qkv[:, : self._query_width].view(-1, self._num_heads, self._head_dim)

    def _attend(self, index: int, queries: Tensor, inputs: StepInputs, out: Tensor) -> None:
        count = inputs.num_decode_rows
        if count:
            self._decode(
                index,
                queries[:count],
                inputs.block_tables[:count],
                inputs.seq_lens[:count],
                out[:count],
            )
        if inputs.cu_query_lens is None:
            return
        k_scale, v_scale = self._pool.scales(index)
        prefill_attention(
            queries[count:],
            self._pool.blocks,
            inputs.block_tables[count:],
            inputs.cu_query_lens,
            inputs.chunk_seq_lens,
            layer=index,
            max_query_len=inputs.max_query_len,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out[count:],
        )

    def _decode(
        self,
        index: int,
        queries: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        k_scale, v_scale = self._pool.scales(index)
        return decode_attention(
            queries,
            self._pool.blocks,
            block_tables,
            seq_lens,
            layer=index,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            workspace=self._workspace,
            launch_pdl=self._is_pdl,
        )

    def _combine(self, index: int, hidden: Tensor, attended: Tensor) -> None:
        """The rest of a layer, added to `hidden` in place."""
        layer = self._layers[index]
        self._add(layer.o, hidden, attended.flatten(1))
        self._add(layer.down, hidden, layer.gate_up.project_swiglu(hidden, rms_eps=self._eps))

    def _add(self, linear: GpuLinear, hidden: Tensor, x: Tensor) -> None:
        if self._communicator.rank == 0:
            linear.add_to_(hidden, x)
        else:
            linear.project(x, out=hidden)
        self._communicator.all_reduce_(hidden)


def _cos_sin_table(config: ModelConfig, max_positions: int, device: torch.device) -> Tensor:
    """float32 [max_positions, head_dim]: cosines, then sines, of half the head's width each."""
    frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
