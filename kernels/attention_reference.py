"""Attention over a paged KV pool in plain torch, float32 inside: what the kernels must equal.

    out = softmax(mask(cap(scale * q k^T))) v,   cap(s) = soft_cap * tanh(s / soft_cap)

A sink is one more logit of its head that takes part in the softmax and carries no value.
Not known here: how a kernel splits or orders the work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kv(
    pool: Tensor,
    block_table: Tensor,
    seq_len: int,
    layer: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, each [seq_len, num_kv_heads, head_dim] float32.

    pool [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], block_table
    [max_blocks_per_seq]; scales [num_kv_heads] multiply what an 8-bit pool stores.
    """
    block_size = pool.shape[4]
    blocks = block_table[: -(-seq_len // block_size)].long()
    kv = pool[:, :, layer][blocks].float()
    keys, values = (
        kv[:, :, side].transpose(1, 2).reshape(-1, pool.shape[1], pool.shape[5])[:seq_len]
        for side in (0, 1)
    )
    if k_scale is not None:
        keys = keys * k_scale[:, None]
    if v_scale is not None:
        values = values * v_scale[:, None]
    return keys, values


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last queries of a context.

    query [num_queries, num_heads, head_dim], the last of which is at position seq_len - 1;
    keys, values [seq_len, num_kv_heads, head_dim] -> float32 output of query's shape and
    [num_queries, num_heads] natural logarithm of the softmax denominators.
    """
    num_queries, num_heads, _ = query.shape
    seq_len, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(seq_len - num_queries, seq_len, device=query.device)[:, None]
    key_position = torch.arange(seq_len, device=query.device)
    visible = key_position <= position
    if sliding_window:
        visible &= key_position > position - sliding_window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(num_heads, num_queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., :seq_len]
    return torch.einsum("hqk,khd->qhd", weights, values), torch.logsumexp(scores, -1).T
