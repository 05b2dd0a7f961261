"""Decode attention straight from the QKV projection: norm, rotation, KV write and attention.

    q, k, v <- heads of a new token's row of qkv
    q, k    <- rms_norm(q) * q_norm, rms_norm(k) * k_norm    (per head, where gains are given)
    q, k    <- rotary embedding at the token's position      (pairs (i, i + head_dim / 2))
    pool[slot] <- k, v;   out = attention of q over the sequence, the new token included

What rope_kv_write and decode_attention do one after the other, in one launch: for few sequences a
launch costs about as much as the work. qkv [num_seqs, (num_heads + 2 * num_kv_heads) * head_dim] is
not changed; cos_sin [max_positions, head_dim] float32 holds cosines of half a head's width, then
sines; all else is as in those two files. The program that has a pair's last tile takes the new key
and value from registers, as the pool would hold them, and stores them; no program reads that slot.

Bytes and FLOPs: those of decode_attention, and the rows of qkv instead of the queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_arguments import AttentionOptions, check_attention
from kernels.decode_attention import (
    MAX_SEQS,
    DecodeTile,
    DecodeWorkspace,
    NewTokens,
    decode_attention_reference,
    launch_decode,
)
from kernels.platform import runs_triton
from kernels.rope_kv_write import check_new_tokens, check_options, rope_kv_write_reference


def fused_decode_attention_reference(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    layer: int,
    num_heads: int,
    eps: float = 1e-6,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    scale: float = 1.0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The two references one after the other."""
    queries = rope_kv_write_reference(
        qkv.clone(), positions, cos_sin, pool, slot_mapping, layer=layer, num_heads=num_heads,
        eps=eps, q_norm=q_norm, k_norm=k_norm, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    return decode_attention_reference(
        queries, pool, block_tables, seq_lens, layer=layer, scale=scale,
        sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip


def fused_decode_attention(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    layer: int,
    num_heads: int,
    eps: float = 1e-6,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    scale: float = 1.0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    tile: DecodeTile | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """qkv [num_seqs, all heads * head_dim] -> [num_seqs, num_heads, head_dim].

    `positions` and `slot_mapping` [num_seqs] are int32 or int64; `seq_lens` counts the new token.
    A row of seq_len 0 becomes zeros and writes nothing, and its position and slot may hold
    anything. Raises ValueError for what the kernel does not take.
    """
    num_seqs, num_kv_heads, head_dim = qkv.shape[0], pool.shape[1], pool.shape[5]
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotation pairs its halves")
    check_new_tokens(qkv, positions, cos_sin, slot_mapping, num_heads, num_kv_heads, head_dim)
    rows = qkv.view(num_seqs, -1, head_dim)
    check_attention(
        rows[:, :num_heads], pool, block_tables, seq_lens, layer=layer, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out, lse=None,
    )  # fmt: skip
    if seq_lens.numel() != num_seqs or num_seqs > MAX_SEQS:
        raise ValueError(
            f"{num_seqs} rows for {seq_lens.numel()} sequences: need one each, at most {MAX_SEQS}"
        )
    check_options(qkv, pool, {"q_norm": q_norm, "k_norm": k_norm})
    if not runs_triton(qkv):
        return fused_decode_attention_reference(
            qkv, positions, cos_sin, pool, slot_mapping, block_tables, seq_lens, layer=layer,
            num_heads=num_heads, eps=eps, q_norm=q_norm, k_norm=k_norm, scale=scale,
            sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks,
            k_scale=k_scale, v_scale=v_scale, out=out,
        )  # fmt: skip
    if out is None:
        out = torch.empty(num_seqs, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_seqs:
        options = AttentionOptions(layer, scale, sliding_window, soft_cap, sinks, k_scale, v_scale)
        launch_decode(
            rows, pool, block_tables, seq_lens, options,
            out=out, lse=None, workspace=workspace, tile=tile, launch_pdl=launch_pdl,
            new=NewTokens(positions, cos_sin, slot_mapping, q_norm, k_norm, eps),
        )  # fmt: skip
    return out
