"""The same attention by FlashAttention-3, cuDNN and torch's flash kernels.

FlashAttention-3 takes part when vLLM's build of it can be imported (`vllm_flash_attn`); cuDNN and
torch get contiguous K and V of equal lengths, which is their best case.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.attention_inputs import DecodeInputs, PagedKv, PrefillInputs
from bench.gpu.cases import Scale
from bench.gpu.timing import Call

FA3_PAGED = "fa3 paged"


def decode_peers(scale: Scale, inputs: DecodeInputs) -> dict[str, Call]:
    peers: dict[str, Call] = {}
    flash = flash_attention_3()
    length = _length(inputs.kv)
    if flash is not None:
        keys, values = separate_kv(inputs.kv)
        cu_query = torch.arange(len(inputs.query) + 1, device=scale.device, dtype=torch.int32)
        peers[FA3_PAGED] = lambda: flash(
            inputs.query,
            keys,
            values,
            max_seqlen_q=1,
            cu_seqlens_q=cu_query,
            max_seqlen_k=length,
            seqused_k=inputs.kv.seq_lens,
            softmax_scale=inputs.scale,
            causal=True,
            block_table=inputs.kv.block_tables,
            fa_version=3,
        )
    if scale.device.type == "cuda":
        contiguous = _contiguous(scale, inputs.kv)
        queries = inputs.query[:, :, None]
        backend = SDPBackend.CUDNN_ATTENTION
        peers["cudnn contiguous"] = _sdpa(backend, queries, *contiguous, is_causal=False)
    return peers


def prefill_peers(scale: Scale, inputs: PrefillInputs) -> dict[str, Call]:
    peers: dict[str, Call] = {}
    flash = flash_attention_3()
    batch, length = len(inputs.kv.seq_lens), _length(inputs.kv)
    if flash is not None:
        keys, values = separate_kv(inputs.kv)
        shared: dict[str, Any] = {
            "max_seqlen_q": inputs.num_new,
            "cu_seqlens_q": inputs.cu_query_lens,
            "max_seqlen_k": length,
            "softmax_scale": inputs.scale,
            "causal": True,
            "fa_version": 3,
        }
        peers[FA3_PAGED] = lambda: flash(
            inputs.query,
            keys,
            values,
            seqused_k=inputs.kv.seq_lens,
            block_table=inputs.kv.block_tables,
            **shared,
        )
        flat = scale.randn(2, batch * length, inputs.kv.pool.shape[1], inputs.query.shape[2])
        cu_keys = torch.arange(batch + 1, device=scale.device, dtype=torch.int32) * length
        peers["fa3 contiguous"] = lambda: flash(
            inputs.query, flat[0], flat[1], cu_seqlens_k=cu_keys, **shared
        )
    if inputs.num_new == length:
        contiguous = _contiguous(scale, inputs.kv)
        queries = inputs.query.view(batch, length, *inputs.query.shape[1:]).transpose(1, 2)
        backends = {"torch flash": SDPBackend.FLASH_ATTENTION}
        if scale.device.type == "cuda":
            backends["cudnn"] = SDPBackend.CUDNN_ATTENTION
        for name, backend in backends.items():
            peers[name] = _sdpa(backend, queries, *contiguous, is_causal=True)
    return peers


def separate_kv(kv: PagedKv) -> tuple[Tensor, Tensor]:
    """K and V as two tensors [num_blocks, block_size, num_kv_heads, head_dim]."""
    layer = kv.pool[:, :, 0].permute(2, 0, 3, 1, 4).contiguous()
    return layer[0], layer[1]


def flash_attention_3() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of vLLM's build, if it is on the path."""
    for name in ("vllm_flash_attn", "vllm.vllm_flash_attn"):
        try:
            module = importlib.import_module(f"{name}.flash_attn_interface")
        except ImportError:
            continue
        function: Callable[..., Any] = module.flash_attn_varlen_func
        return function
    return None


def _length(kv: PagedKv) -> int:
    return int(kv.seq_lens[0])


def _contiguous(scale: Scale, kv: PagedKv) -> Sequence[Tensor]:
    _, num_kv_heads, _, _, _, head_dim = kv.pool.shape
    return scale.randn(2, len(kv.seq_lens), num_kv_heads, _length(kv), head_dim).unbind()


def _sdpa(
    backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor, *, is_causal: bool
) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=is_causal, enable_gqa=True
            )

    return call
