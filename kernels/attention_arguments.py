"""What both attention launchers take: limits, argument checks, the dtype to compute in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.platform import is_interpreted

MAX_HEAD_DIM = 256
MAX_GROUP = 64
"""Query heads of one KV head: the rows that share each key."""
MAX_BLOCK_SIZE = 1024
HOPPER_MULTIPROCESSORS = 132
"""Of an H100 or H200, where there is no GPU to ask: kernels are compiled, not run."""
FP8 = torch.float8_e4m3fn
QUERY_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class AttentionOptions(NamedTuple):
    """What the launchers of both attentions pass on to their kernels."""

    layer: int
    scale: float
    sliding_window: int
    soft_cap: float
    sinks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


def num_multiprocessors(device: torch.device) -> int:
    """Of the GPU; a few under the interpreter, which runs one program after the other."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 2 if is_interpreted() else HOPPER_MULTIPROCESSORS


def is_hopper(device: torch.device) -> bool:
    """Whether kernels made for its instructions run there."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def compute_dtype(query: Tensor, pool: Tensor) -> tl.dtype:
    """Operands of the two products: the pool's dtype, or what its 8-bit values widen to.

    float16 holds every e4m3 value and takes one instruction for two of them; bfloat16 takes three.
    """
    if pool.dtype == FP8 and query.dtype == torch.bfloat16:
        return tl.float16
    return QUERY_DTYPES[query.dtype]


def check_attention(
    query: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    layer: int,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
) -> None:
    """Raises ValueError, with the value, the limit and the fix, for what no kernel takes."""
    if query.dim() != 3 or pool.dim() != 6:
        raise ValueError(
            f"query {tuple(query.shape)} must be [rows, heads, head_dim] and pool "
            f"{tuple(pool.shape)} [blocks, kv_heads, layers, 2, block_size, head_dim]"
        )
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, num_layers, _, block_size, _ = pool.shape
    if pool.shape[3] != 2 or pool.shape[5] != head_dim:
        raise ValueError(f"pool {tuple(pool.shape)} must end in [2, block_size, {head_dim}]")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is above {MAX_HEAD_DIM}; such heads need splitting")
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        raise ValueError(
            f"{num_heads} query heads over {num_kv_heads} KV heads: need a multiple, at most "
            f"{MAX_GROUP} each"
        )
    if block_size & (block_size - 1) or block_size > MAX_BLOCK_SIZE:
        raise ValueError(f"block_size {block_size} must be a power of two up to {MAX_BLOCK_SIZE}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} is outside 0..{num_layers - 1} of the pool")
    _check_dtypes(query, pool, k_scale, v_scale)
    if query.stride(2) != 1 or pool.stride(5) != 1:
        raise ValueError("head_dim must be contiguous in query and pool; call .contiguous()")
    if block_tables.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        raise ValueError(
            f"block_tables are {block_tables.dtype} and seq_lens {seq_lens.dtype}; "
            "both must be int32"
        )
    if block_tables.dim() != 2 or block_tables.stride(1) != 1 or not seq_lens.is_contiguous():
        raise ValueError("rows of block_tables, and seq_lens, must be contiguous")
    if block_tables.shape[0] != seq_lens.numel():
        raise ValueError(f"{block_tables.shape[0]} block tables for {seq_lens.numel()} seq_lens")
    for name, tensor, length in (
        ("sinks", sinks, num_heads),
        ("k_scale", k_scale, num_kv_heads),
        ("v_scale", v_scale, num_kv_heads),
    ):
        if tensor is not None:
            _check_vector(name, tensor, length)
    if out is not None and (out.shape != query.shape or out.stride(2) != 1):
        raise ValueError(f"out must be {tuple(query.shape)} with contiguous head_dim")
    if lse is not None and (
        lse.shape != query.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()
    ):
        raise ValueError(f"lse must be contiguous float32 {tuple(query.shape[:2])}")
    tensors = (pool, block_tables, seq_lens, sinks, k_scale, v_scale, out, lse)
    if any(t is not None and t.device != query.device for t in tensors):
        raise ValueError(f"query is on {query.device}; move all other tensors there")


def _check_dtypes(
    query: Tensor, pool: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    if query.dtype not in QUERY_DTYPES:
        raise ValueError(f"query is {query.dtype}; take one of {list(QUERY_DTYPES)}")
    if pool.dtype not in (query.dtype, FP8):
        raise ValueError(f"pool is {pool.dtype}; with {query.dtype} queries take that or {FP8}")
    if pool.dtype != FP8 and (k_scale is not None or v_scale is not None):
        raise ValueError(f"k_scale and v_scale belong to a {FP8} pool, this one is {pool.dtype}")


def _check_vector(name: str, tensor: Tensor, length: int) -> None:
    if tensor.shape != (length,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be contiguous float32 "
            f"({length},)"
        )
