"""Launches of the small kernels at real models' shapes, to be compiled for Hopper anywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.block_copy import copy_blocks, gather_blocks
from kernels.embedding import embed
from kernels.one_shot_all_reduce import (
    DEFAULT_MAX_BYTES,
    buffer_bytes,
    make_peers,
    one_shot_all_reduce,
)
from kernels.piece_copy import copy_pieces, make_side
from kernels.rms_norm import rms_norm
from kernels.rope_kv_write import rope_kv_write
from kernels.swiglu import swiglu

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


def _rms_norm(num_rows: int, width: int, *, has_residual: bool = False) -> None:
    x = torch.empty(num_rows, width, dtype=BF16)
    weight = torch.empty(width, dtype=BF16)
    residual = torch.empty_like(x) if has_residual else None
    rms_norm(x, eps=1e-5, weight=weight, residual=residual, launch_pdl=True)  # type: ignore[call-overload]


def _swiglu(num_rows: int, width: int) -> None:
    swiglu(torch.empty(num_rows, 2 * width, dtype=BF16), launch_pdl=True)


def _rope(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block_size: int = 64,
    pool_dtype: torch.dtype = BF16,
    has_norms: bool = False,
) -> None:
    pool = torch.empty(4, num_kv_heads, 2, 2, block_size, head_dim, dtype=pool_dtype)
    gain = torch.empty(head_dim, dtype=BF16) if has_norms else None
    scale = torch.empty(num_kv_heads) if pool_dtype == FP8 else None
    rope_kv_write(
        torch.empty(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=BF16),
        torch.empty(num_tokens, dtype=torch.int64),
        torch.empty(128, head_dim),
        pool,
        torch.empty(num_tokens, dtype=torch.int64),
        layer=1,
        num_heads=num_heads,
        q_norm=gain,
        k_norm=gain,
        k_scale=scale,
        v_scale=scale,
        launch_pdl=True,
    )


def _blocks() -> None:
    pool = torch.empty(4, 8, 4, 2, 64, 128, dtype=BF16)
    ids = torch.empty(3, dtype=torch.int32)
    copy_blocks(pool, pool, src_ids=ids, dst_ids=ids)
    gather_blocks(pool[:, 2:4], ids, launch_pdl=True)


def _pieces(*, tp_sizes: tuple[int, int] = (1, 1), block_sizes: tuple[int, int] = (64, 64)) -> None:
    """What one rank of a reader takes from rank 0 of an owner: 32 layers, 8 KV heads of 128."""
    unit, rows = min(block_sizes), 32 * 2
    sides = []
    for tp_size, block_size in zip(tp_sizes, block_sizes, strict=True):
        heads, moved = 8 // tp_size, 8 // max(tp_sizes)
        row_bytes = block_size * 128 * 2
        if block_sizes[0] == block_sizes[1]:
            offsets = torch.zeros(1, 1, dtype=torch.int64)
            piece_bytes = moved * rows * row_bytes
        else:
            parts = torch.arange(block_size // unit)[:, None] * (unit * 256)
            offsets = torch.arange(moved * rows)[None] * row_bytes + parts
            piece_bytes = unit * 256
        sides.append(
            make_side(
                1 << 45,
                offsets,
                block_bytes=heads * rows * row_bytes,
                piece_bytes=piece_bytes,
                device=torch.device("cpu"),
            )
        )
    units = torch.empty(3, dtype=torch.int32)
    copy_pieces(sides[0], sides[1], src_units=units, dst_units=units)


def _all_reduce(num_tokens: int, width: int, world_size: int) -> None:
    # Not mapped anywhere: only their alignment is looked at.
    addresses = tuple((1 << 45) + (rank << 32) for rank in range(world_size))
    num_bytes = buffer_bytes(DEFAULT_MAX_BYTES, world_size)
    peers = make_peers(torch.empty(num_bytes, dtype=torch.uint8), addresses, rank=1)
    x = torch.empty(num_tokens, width, dtype=BF16)
    one_shot_all_reduce(x, peers, residual=torch.empty_like(x), launch_pdl=True)


def _embed(num_tokens: int, width: int) -> None:
    indices = torch.empty(num_tokens, dtype=torch.int32)
    embed(
        torch.empty(num_tokens, dtype=torch.int64),
        torch.empty(64, width, dtype=BF16),
        first_token=64,
        pending_index=indices,
        last_tokens=torch.empty(8, dtype=torch.int64),
        resolved=indices,
        launch_pdl=True,
    )


CASES: dict[str, Callable[[], None]] = {
    "rms_norm 1x4096": lambda: _rms_norm(1, 4096),
    "rms_norm 1x4096 residual": lambda: _rms_norm(1, 4096, has_residual=True),
    "rms_norm 8192x2048 residual": lambda: _rms_norm(8192, 2048, has_residual=True),
    "rms_norm 64x16384 residual": lambda: _rms_norm(64, 16384, has_residual=True),
    "rms_norm 100000x128": lambda: _rms_norm(100_000, 128),
    "swiglu 1x14336": lambda: _swiglu(1, 14336),
    "swiglu 8192x14336": lambda: _swiglu(8192, 14336),
    "swiglu 64x11008": lambda: _swiglu(64, 11008),
    "rope llama-3.1-8b decode": lambda: _rope(1, 32, 8, 128),
    "rope llama-3.1-8b prefill": lambda: _rope(8192, 32, 8, 128),
    "rope llama-3.1-8b prefill fp8": lambda: _rope(8192, 32, 8, 128, pool_dtype=FP8),
    "rope llama-3.2-1b decode": lambda: _rope(1, 32, 8, 64),
    "rope llama-3.2-1b prefill": lambda: _rope(8192, 32, 8, 64, block_size=16),
    "rope llama-2-7b prefill": lambda: _rope(8192, 32, 32, 128),
    "rope qwen3 norms": lambda: _rope(8192, 32, 8, 128, has_norms=True),
    "rope head_dim 80": lambda: _rope(1024, 32, 32, 80),
    "rope head_dim 96": lambda: _rope(1024, 24, 8, 96),
    "rope head_dim 256 norms fp8": lambda: _rope(1024, 16, 16, 256, pool_dtype=FP8, has_norms=True),
    "blocks": _blocks,
    "pieces tp1 to tp1": _pieces,
    "pieces tp2 to tp1": lambda: _pieces(tp_sizes=(2, 1)),
    "pieces tp1 to tp8": lambda: _pieces(tp_sizes=(1, 8)),
    "pieces 16 to 64": lambda: _pieces(block_sizes=(16, 64)),
    "pieces tp2 to tp1, 64 to 16": lambda: _pieces(tp_sizes=(2, 1), block_sizes=(64, 16)),
    "all_reduce 1x4096 tp2": lambda: _all_reduce(1, 4096, 2),
    "all_reduce 64x4096 tp8": lambda: _all_reduce(64, 4096, 8),
    "embed 1x4096": lambda: _embed(1, 4096),
    "embed 8192x4096": lambda: _embed(8192, 4096),
}

EXPECTS_WIDE_ACCESSES = {case for case in CASES if not case.endswith("fp8")}
"""All are bound by memory. Into an 8-bit pool a thread stores what it loaded in half the bytes."""
