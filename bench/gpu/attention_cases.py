"""Decode and prefill attention over paged KV at the lengths and batches that serving meets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.attention_inputs import FP8, Heads, decode_inputs, prefill_inputs
from bench.gpu.attention_peers import decode_peers, prefill_peers
from bench.gpu.cases import ERROR_LIMITS, OURS, Bound, Case, PlannedCase, Scale
from bench.gpu.timing import Call

DECODE = "decode-attention"
PREFILL = "prefill-attention"
BF16 = torch.bfloat16


def decode_cases(scale: Scale) -> Iterator[PlannedCase]:
    """One query a sequence; the bytes are those of K and V."""
    heads = Heads()
    for batch, length, block_size, dtype in (
        (128, 4096, 64, BF16),
        (64, 4096, 64, BF16),
        (128, 4096, 64, FP8),
        (256, 4096, 64, FP8),
        (128, 4096, 16, BF16),
        (256, 1024, 64, BF16),
        (128, 1024, 64, BF16),
        (64, 1024, 64, BF16),
        (32, 1024, 64, BF16),
        (8, 1024, 64, BF16),
        (1, 4096, 64, BF16),
        (8, 4096, 64, BF16),
        (1, 32768, 64, BF16),
        (64, 4096, 16, BF16),
        (8, 4096, 16, BF16),
        (1, 4096, 16, BF16),
        (64, 1024, 64, FP8),
        (1, 4096, 64, FP8),
        (1, 128, 64, BF16),
        (1, 1024, 64, BF16),
        (16, 1024, 64, BF16),
        (128, 4096, 16, FP8),
        (8, 4096, 64, FP8),
        (1, 32768, 64, FP8),
    ):
        yield _planned_decode(scale, heads, batch, length, block_size, dtype)
    yield _planned_decode(scale, Heads(32, 8, 64), 128, 4096, 64, BF16)
    yield _planned_decode(scale, Heads(32, 32, 128), 32, 4096, 64, BF16)


def _planned_decode(
    scale: Scale, heads: Heads, batch: int, length: int, block_size: int, dtype: torch.dtype
) -> PlannedCase:
    name = f"{batch} x {length} {heads} block {block_size} {_kind(dtype)}"
    build = partial(
        decode_case,
        scale,
        name,
        heads.at(scale),
        scale.upto(batch, 2),
        scale.upto(length, 90),
        block_size,
        dtype,
    )
    return PlannedCase(DECODE, name, build)


def decode_case(
    scale: Scale,
    name: str,
    heads: Heads,
    batch: int,
    length: int,
    block_size: int,
    dtype: torch.dtype,
) -> Case:
    kv_bytes = 2 * batch * length * heads.num_kv_heads * heads.head_dim * dtype.itemsize
    width = heads.num_heads * heads.head_dim
    inputs = [
        decode_inputs(scale, heads, batch, length, block_size, dtype)
        for _ in range(scale.num_input_sets(kv_bytes))
    ]
    contenders: dict[str, list[Call]] = {OURS: [one.run for one in inputs]}
    if dtype == BF16 and scale.has_peers:
        for one in inputs:
            for peer, call in decode_peers(scale, one).items():
                contenders.setdefault(peer, []).append(call)
    return Case(
        group=DECODE,
        name=name,
        num_bytes=kv_bytes + 2 * batch * width * BF16.itemsize,
        flops=4.0 * batch * length * width,
        bound=Bound.COPY,
        contenders=contenders,
        error=inputs[0].error,
        error_limit=ERROR_LIMITS[BF16],
    )


def prefill_cases(scale: Scale) -> Iterator[PlannedCase]:
    """Causal attention of whole prompts, and of a chunk behind a cached prefix."""
    heads = Heads()
    for batch, prefix, new, block_size, dtype in (
        (1, 0, 8192, 64, BF16),
        (1, 0, 8192, 16, BF16),
        (1, 0, 8192, 64, FP8),
        (1, 0, 32768, 64, BF16),
        (4, 0, 2048, 64, BF16),
        (8, 0, 1024, 64, BF16),
        (1, 4096, 1024, 64, BF16),
        (1, 28672, 4096, 64, BF16),
        (1, 0, 1024, 64, BF16),
        (1, 4096, 1024, 64, FP8),
        (1, 4096, 1024, 16, BF16),
    ):
        yield _planned_prefill(scale, heads, batch, prefix, new, block_size, dtype)
    yield _planned_prefill(scale, Heads(32, 8, 64), 1, 0, 8192, 64, BF16)
    yield _planned_prefill(scale, Heads(32, 32, 128), 1, 0, 4096, 64, BF16)


def _planned_prefill(
    scale: Scale,
    heads: Heads,
    batch: int,
    prefix: int,
    new: int,
    block_size: int,
    dtype: torch.dtype,
) -> PlannedCase:
    what = f"{batch} x {new}" + (f" behind {prefix}" if prefix else "")
    name = f"{what} {heads} block {block_size} {_kind(dtype)}"
    build = partial(
        prefill_case,
        scale,
        name,
        heads.at(scale),
        scale.upto(batch, 2),
        scale.upto(prefix, 70),
        scale.upto(new, 140),
        block_size,
        dtype,
    )
    return PlannedCase(PREFILL, name, build)


def prefill_case(
    scale: Scale,
    name: str,
    heads: Heads,
    batch: int,
    prefix: int,
    new: int,
    block_size: int,
    dtype: torch.dtype,
) -> Case:
    length, width = prefix + new, heads.num_heads * heads.head_dim
    pairs = batch * (new * prefix + new * (new + 1) / 2)
    kv_bytes = 2 * batch * length * heads.num_kv_heads * heads.head_dim * dtype.itemsize
    inputs = prefill_inputs(scale, heads, batch, prefix, new, block_size, dtype)
    contenders: dict[str, list[Call]] = {OURS: [inputs.run]}
    if dtype == BF16 and scale.has_peers:
        contenders |= {name: [call] for name, call in prefill_peers(scale, inputs).items()}
    return Case(
        group=PREFILL,
        name=name,
        num_bytes=kv_bytes + 2 * batch * new * width * BF16.itemsize,
        flops=4.0 * pairs * width,
        bound=Bound.MATMUL,
        contenders=contenders,
        error=inputs.error,
        error_limit=ERROR_LIMITS[BF16],
    )


def _kind(dtype: torch.dtype) -> str:
    return "fp8 KV" if dtype == FP8 else "bf16"
