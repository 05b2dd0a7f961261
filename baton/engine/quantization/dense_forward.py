"""A model over one whole text at once, without a KV pool: for calibration and for judging quality.

Not known here: what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.linear import Linear
from baton.engine.layers.rms_norm import RmsNorm
from baton.engine.layers.rotary import Rotary
from baton.engine.weights import LoadedModel

LinearT = TypeVar("LinearT", bound=Linear)
KvTap = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys, values), each rotated where due and [num_tokens, num_kv_heads, head_dim] -> what
attention is to see."""


def _unchanged(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


@torch.inference_mode()
def last_hidden(
    model: LoadedModel[LinearT], token_ids: Tensor, *, kv_tap: KvTap = _unchanged
) -> Tensor:
    """token_ids int64 [num_tokens] -> the head's input for every token, [num_tokens, hidden]."""
    c, weights, num_tokens = model.model_config, model.weights, len(token_ids)
    norm = RmsNorm(c.hidden_size, c.rms_norm_eps, model.device)
    rotary = Rotary(
        c.rope,
        head_dim=c.head_dim,
        max_positions=num_tokens,
        dtype=weights.embedding.dtype,
        device=model.device,
    )
    tables = rotary.tables(torch.arange(num_tokens))
    hidden = F.embedding(token_ids, weights.embedding)
    for index, layer in enumerate(weights.layers):
        heads = layer.qkv(norm(hidden)).view(num_tokens, -1, c.head_dim)
        rotary.apply_(heads[:, : c.num_heads + c.num_kv_heads], tables)
        queries, keys, values = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        keys, values = kv_tap(index, keys, values)
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            is_causal=True,
            scale=1.0,
            enable_gqa=True,
        )
        attended = attended[0].transpose(0, 1).reshape(num_tokens, -1)
        hidden = layer.o.add_to(hidden, attended)
        gate, up = layer.gate_up(norm(hidden)).chunk(2, dim=-1)
        hidden = layer.down.add_to(hidden, F.silu(gate).mul_(up))
    return norm(hidden)
