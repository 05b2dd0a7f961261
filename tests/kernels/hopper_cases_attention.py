"""Launches of the attention kernels at the shapes of Llama-3.1-8B, Llama-3.2-1B and Llama-2-7B.

Called while compiling for Hopper without a GPU: contents of the tensors are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.decode_attention import decode_attention
from kernels.fused_decode_attention import fused_decode_attention
from kernels.merge_states import merge_states
from kernels.prefill_attention import prefill_attention

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-3.2-1b": Shape(32, 8, 64),
    "llama-2-7b": Shape(32, 32, 128),
}


def _decode(
    shape: Shape, pool_dtype: torch.dtype, block_size: int, num_seqs: int
) -> Callable[[], None]:
    def call() -> None:
        pool = torch.empty(
            2, shape.num_kv_heads, 2, 2, block_size, shape.head_dim, dtype=pool_dtype
        )
        decode_attention(
            torch.empty(num_seqs, shape.num_heads, shape.head_dim, dtype=torch.bfloat16),
            pool,
            torch.empty(num_seqs, 8, dtype=torch.int32),
            torch.empty(num_seqs, dtype=torch.int32),
            layer=1,
            launch_pdl=True,
            **_scales(shape, pool_dtype),
        )

    return call


def _fused_decode(
    shape: Shape, pool_dtype: torch.dtype, block_size: int, num_seqs: int
) -> Callable[[], None]:
    def call() -> None:
        pool = torch.empty(
            2, shape.num_kv_heads, 2, 2, block_size, shape.head_dim, dtype=pool_dtype
        )
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        fused_decode_attention(
            torch.empty(num_seqs, width, dtype=torch.bfloat16),
            torch.empty(num_seqs, dtype=torch.int64),
            torch.empty(64, shape.head_dim),
            pool,
            torch.empty(num_seqs, dtype=torch.int64),
            torch.empty(num_seqs, 8, dtype=torch.int32),
            torch.empty(num_seqs, dtype=torch.int32),
            layer=1,
            num_heads=shape.num_heads,
            launch_pdl=True,
            **_scales(shape, pool_dtype),
        )

    return call


def _prefill(
    shape: Shape, pool_dtype: torch.dtype, block_size: int, query_len: int
) -> Callable[[], None]:
    def call() -> None:
        pool = torch.empty(
            2, shape.num_kv_heads, 2, 2, block_size, shape.head_dim, dtype=pool_dtype
        )
        prefill_attention(
            torch.empty(query_len, shape.num_heads, shape.head_dim, dtype=torch.bfloat16),
            pool,
            torch.empty(1, 8, dtype=torch.int32),
            torch.empty(2, dtype=torch.int32),
            torch.empty(1, dtype=torch.int32),
            layer=1,
            max_query_len=query_len,
            **_scales(shape, pool_dtype),
        )

    return call


def _scales(shape: Shape, pool_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if pool_dtype != FP8:
        return {}
    return {name: torch.empty(shape.num_kv_heads) for name in ("k_scale", "v_scale")}


def _merge() -> None:
    merge_states(torch.empty(4, 64, 128), torch.empty(4, 64), launch_pdl=True)


CASES: dict[str, Callable[[], None]] = {"merge_states": _merge}
for _name, _shape in SHAPES.items():
    for _dtype, _dtype_name in ((torch.bfloat16, "bf16"), (FP8, "fp8")):
        for _num_seqs in (1, 64, 256):
            CASES[f"decode {_name} {_dtype_name} batch {_num_seqs}"] = _decode(
                _shape, _dtype, 64, _num_seqs
            )
            CASES[f"fused decode {_name} {_dtype_name} batch {_num_seqs}"] = _fused_decode(
                _shape, _dtype, 64, _num_seqs
            )
        for _block_size in (16, 64):
            CASES[f"prefill {_name} {_dtype_name} block {_block_size}"] = _prefill(
                _shape, _dtype, _block_size, 8192
            )
        CASES[f"prefill {_name} {_dtype_name} 32 queries"] = _prefill(_shape, _dtype, 64, 32)

EXPECTS_GMMA = [name for name in CASES if name.startswith("prefill")]
QUICK_CASES = [
    "merge_states",
    "decode llama-3.1-8b bf16 batch 1",
    "decode llama-3.1-8b fp8 batch 64",
    "fused decode llama-3.1-8b bf16 batch 1",
    "prefill llama-3.1-8b bf16 block 64",
    "prefill llama-3.1-8b fp8 block 64",
    "prefill llama-3.2-1b bf16 block 16",
]

# bfloat16 decode: registers saved around the loops over tiles and over parts. The others: with more
# registers fewer programs fit on a multiprocessor, which was slower on an H200.
ALLOWED_SPILL_BYTES = {name: 64 for name in CASES if "decode" in name or "prefill" in name}
