"""What stands between the products of a layer, and copies of KV blocks, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cases import (
    ERROR_LIMITS,
    OURS,
    Bound,
    Case,
    PlannedCase,
    Scale,
    compiled_peer,
    relative_error,
    worst,
)
from bench.gpu.shapes import LLAMA_3_1_8B
from bench.gpu.timing import Call
from kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope_kv_write import rope_kv_write, rope_kv_write_reference
from kernels.swiglu import swiglu, swiglu_reference

NORMS = "norms"
ROPE = "rope"
BLOCK_COPY = "block-copy"
BF16 = torch.bfloat16
EPS = 1e-5
ROWS = (8192, 1024, 64, 8, 1)
COPIED_BYTES = 1 << 30
NUM_POSITIONS = 8192
FP8_ERROR_LIMIT = 6e-2
"""A value between two of e4m3's may be rounded either way, an eighth of it apart."""


def norm_cases(scale: Scale) -> Iterator[PlannedCase]:
    """RMSNorm, plain and behind a residual addition, and SwiGLU."""
    model = LLAMA_3_1_8B
    for rows in ROWS:
        hidden = scale.upto(rows, 5), scale.upto(model.hidden_size, 256)
        width = hidden[0], scale.upto(model.intermediate_size, 384)
        name = f"rms_norm {rows} x {model.hidden_size}"
        yield PlannedCase(NORMS, name, partial(norm_case, scale, name, *hidden))
        name = f"residual + rms_norm {rows} x {model.hidden_size}"
        yield PlannedCase(NORMS, name, partial(residual_norm_case, scale, name, *hidden))
        name = f"swiglu {rows} x {model.intermediate_size}"
        yield PlannedCase(NORMS, name, partial(swiglu_case, scale, name, *width))


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), weight, EPS)


def torch_residual_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    residual.add_(x)
    return F.rms_norm(residual, (x.shape[1],), weight, EPS)


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def norm_case(scale: Scale, name: str, num_rows: int, width: int) -> Case:
    num_bytes = 2.0 * (2 * num_rows * width + width)
    xs = [scale.randn(num_rows, width) for _ in range(scale.num_input_sets(int(num_bytes)))]
    weight = scale.randn(width)
    outs = [torch.empty_like(x) for x in xs]

    def error() -> float:
        actual = rms_norm(xs[0], eps=EPS, weight=weight, out=outs[0])
        return relative_error(actual, rms_norm_reference(xs[0], eps=EPS, weight=weight))

    ours: list[Call] = [
        partial(rms_norm, x, eps=EPS, weight=weight, out=out)
        for x, out in zip(xs, outs, strict=True)
    ]
    contenders = {OURS: ours} | _torch_peers(scale, torch_norm, [(x, weight) for x in xs])
    return _case(NORMS, name, num_bytes, 4.0 * num_rows * width, contenders, error)


def residual_norm_case(scale: Scale, name: str, num_rows: int, width: int) -> Case:
    """The residual is updated in place, so that every timed call adds once more."""
    num_bytes = 2.0 * (4 * num_rows * width + width)
    num_sets = scale.num_input_sets(int(num_bytes))
    pairs = [(scale.randn(num_rows, width), scale.randn(num_rows, width)) for _ in range(num_sets)]
    weight = scale.randn(width)
    outs = [torch.empty_like(x) for x, _ in pairs]

    def error() -> float:
        x, residual = pairs[0]
        wanted_residual = residual.clone()
        wanted = rms_norm_reference(x, eps=EPS, weight=weight, residual=wanted_residual)
        rms_norm(x, eps=EPS, weight=weight, residual=residual, out=outs[0])
        errors = relative_error(outs[0], wanted), relative_error(residual, wanted_residual)
        return worst(errors)

    ours: list[Call] = [
        partial(rms_norm, x, eps=EPS, weight=weight, residual=residual, out=out)
        for (x, residual), out in zip(pairs, outs, strict=True)
    ]
    arguments = [(x, residual.clone(), weight) for x, residual in pairs]
    contenders = {OURS: ours} | _torch_peers(scale, torch_residual_norm, arguments)
    return _case(NORMS, name, num_bytes, 5.0 * num_rows * width, contenders, error)


def swiglu_case(scale: Scale, name: str, num_rows: int, width: int) -> Case:
    num_bytes = 2.0 * 3 * num_rows * width
    num_sets = scale.num_input_sets(int(num_bytes))
    inputs = [scale.randn(num_rows, 2 * width) for _ in range(num_sets)]
    outs = [torch.empty(num_rows, width, device=scale.device, dtype=BF16) for _ in inputs]

    def error() -> float:
        return relative_error(swiglu(inputs[0], out=outs[0]), swiglu_reference(inputs[0]))

    ours: list[Call] = [partial(swiglu, x, out=out) for x, out in zip(inputs, outs, strict=True)]
    contenders = {OURS: ours} | _torch_peers(scale, torch_swiglu, [(x,) for x in inputs])
    return _case(NORMS, name, num_bytes, 5.0 * num_rows * width, contenders, error)


def rope_cases(scale: Scale) -> Iterator[PlannedCase]:
    """RoPE and the KV write of one step's tokens, in bfloat16 and e4m3 pools."""
    for rows in ROWS:
        for dtype in (BF16, torch.float8_e4m3fn):
            kind = "bf16" if dtype == BF16 else "fp8 KV"
            name = f"rope + KV write {rows} tokens h32/8 d128 {kind}"
            num_tokens = scale.upto(rows, 5)
            yield PlannedCase(ROPE, name, partial(rope_case, scale, name, num_tokens, dtype))


def torch_rope_kv_write(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, pool: Tensor, slots: Tensor, num_heads: int
) -> Tensor:
    _, num_kv_heads, _, _, block_size, head_dim = pool.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    first, second = torch.cat((q, k), dim=1).float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned = turned.to(qkv.dtype)
    queries: Tensor = q.copy_(turned[:, :num_heads])
    kv = torch.stack((turned[:, num_heads:], v), dim=2)
    pool[slots // block_size, :, 0, :, slots % block_size] = kv
    return queries


def rope_case(scale: Scale, name: str, num_tokens: int, dtype: torch.dtype) -> Case:
    """Queries are turned in place, so that every timed call turns them once more."""
    num_heads, num_kv_heads, head_dim, block_size = 32, 8, 128, 64
    width = (num_heads + 2 * num_kv_heads) * head_dim
    kv_width = 2 * num_kv_heads * head_dim
    moved = BF16.itemsize * (width + num_heads * head_dim) + dtype.itemsize * kv_width
    num_bytes = num_tokens * (moved + 4.0 * head_dim)
    device = scale.device
    num_blocks = -(-num_tokens // block_size) + 1
    shape = (num_blocks, num_kv_heads, 1, 2, block_size, head_dim)
    angles = torch.outer(
        torch.arange(NUM_POSITIONS, device=device, dtype=torch.float32),
        10000.0 ** -torch.linspace(0, 1, head_dim // 2, device=device),
    )
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,), device=device)
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens]
    scales = None if dtype == BF16 else torch.full((num_kv_heads,), 0.75, device=device)
    inputs = [
        (scale.randn(num_tokens, width), scale.randn(*shape, dtype=dtype))
        for _ in range(scale.num_input_sets(int(num_bytes)))
    ]
    write = partial(rope_kv_write, layer=0, num_heads=num_heads, k_scale=scales, v_scale=scales)

    def error() -> float:
        qkv, pool = (tensor.clone() for tensor in inputs[0])
        wanted = rope_kv_write_reference(
            qkv, positions, cos_sin, pool, slots,
            layer=0, num_heads=num_heads, k_scale=scales, v_scale=scales,
        )  # fmt: skip
        actual = write(inputs[0][0], positions, cos_sin, inputs[0][1], slots)
        return worst((relative_error(actual, wanted), relative_error(inputs[0][1], pool)))

    contenders: dict[str, list[Call]] = {
        OURS: [partial(write, qkv, positions, cos_sin, pool, slots) for qkv, pool in inputs]
    }
    if dtype == BF16:
        arguments = [(qkv, positions, cos_sin, pool, slots, num_heads) for qkv, pool in inputs]
        contenders |= _torch_peers(scale, torch_rope_kv_write, arguments)
    flops = 3.0 * num_tokens * (num_heads + num_kv_heads) * head_dim
    limit = ERROR_LIMITS[BF16] if dtype == BF16 else FP8_ERROR_LIMIT
    return _case(ROPE, name, num_bytes, flops, contenders, error, limit)


def block_copy_cases(scale: Scale) -> Iterator[PlannedCase]:
    """1 GiB in blocks of one layer, of a few, and of a whole model's tokens."""
    for kib in (2048, 512, 128, 32):
        for kind in ("gather", "scatter", "copy"):
            name = f"{kind} blocks of {kib} KiB"
            block_bytes = scale.upto(kib << 10, 4096)
            num_blocks = scale.upto(COPIED_BYTES // (kib << 10), 3)
            build = partial(block_copy_case, scale, name, kind, block_bytes, num_blocks)
            yield PlannedCase(BLOCK_COPY, name, build)


def block_copy_case(scale: Scale, name: str, kind: str, block_bytes: int, num_blocks: int) -> Case:
    pool = scale.randn(2 * num_blocks, block_bytes // BF16.itemsize)
    other = scale.randn(2 * num_blocks if kind == "copy" else num_blocks, pool.shape[1])
    order = torch.randperm(2 * num_blocks, device=scale.device)
    ids, target_ids = order[:num_blocks], order.flip(0)[:num_blocks]

    def run() -> Tensor:
        if kind == "gather":
            return gather_blocks(pool, ids, out=other)
        if kind == "scatter":
            scatter_blocks(other, pool, ids)
            return pool[ids]
        copy_blocks(pool, other, src_ids=ids, dst_ids=target_ids)
        return other[target_ids]

    ours: dict[str, Call] = {
        "gather": lambda: gather_blocks(pool, ids, out=other),
        "scatter": lambda: scatter_blocks(other, pool, ids),
        "copy": lambda: copy_blocks(pool, other, src_ids=ids, dst_ids=target_ids),
    }
    peers: dict[str, Call] = {
        "gather": lambda: torch.index_select(pool, 0, ids, out=other),
        "scatter": lambda: pool.index_copy_(0, ids, other),
        "copy": lambda: other.index_copy_(0, target_ids, pool[ids]),
    }

    def error() -> float:
        return relative_error(run(), other if kind == "scatter" else pool[ids])

    contenders: dict[str, list[Call]] = {OURS: [ours[kind]]}
    if scale.has_peers:
        contenders["torch"] = [peers[kind]]
    num_bytes = 2.0 * num_blocks * block_bytes
    return _case(BLOCK_COPY, name, num_bytes, 0.0, contenders, error, error_limit=0.0)


def _torch_peers(
    scale: Scale, function: Callable[..., object], arguments: Sequence[tuple[object, ...]]
) -> dict[str, list[Call]]:
    """Eager, and compiled where there is a GPU."""
    if not scale.has_peers:
        return {}
    peers: dict[str, list[Call]] = {"torch": [partial(function, *one) for one in arguments]}
    if scale.device.type == "cuda":
        fused = compiled_peer(function)
        peers["torch.compile"] = [partial(fused, *one) for one in arguments]
    return peers


def _case(
    group: str,
    name: str,
    num_bytes: float,
    flops: float,
    contenders: dict[str, list[Call]],
    error: Callable[[], float],
    error_limit: float = ERROR_LIMITS[BF16],
) -> Case:
    return Case(group, name, num_bytes, flops, Bound.COPY, contenders, error, error_limit)
