"""What lies between the QKV projection and attention, in one pass over its output.

    q, k <- rms_norm(q) * q_norm, rms_norm(k) * k_norm     (per head, where gains are given)
    q, k <- rotary embedding at the token's position       (pairs (i, i + head_dim / 2))
    q stays in qkv, k and v go to the paged pool

qkv         [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: all query heads, all key
            heads, all value heads; rows may be strided. Queries are replaced in place.
positions   [num_tokens] int32 or int64, below max_positions
cos_sin     [max_positions, head_dim] float32: cosines of the head_dim / 2 angles, then sines
pool        [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], K at 0, V at 1; of
            qkv's dtype or float8_e4m3fn
slot_mapping[num_tokens] int32 or int64: block_id * block_size + offset; -1 is padding, whose row
            and position may hold anything and for which nothing is written
k_scale, v_scale [num_kv_heads] float32: stored = value / scale

Into an 8-bit pool values saturate at +-448 and a NaN is stored as 0: one bad token must not
poison keys that later steps read in whole blocks. It still shows in the token's own queries.

Bytes: num_tokens * head_dim * (num_heads * 2 + num_kv_heads * 2) * itemsize, as much again of
num_kv_heads * 2 * pool itemsize, and head_dim * 4 of cos_sin a token. Bound: copy bandwidth;
latency for a few tokens.
Limits: head_dim even, 16..256; block_size a power of two; the pool may pass 2^31 elements.
Source: Su et al., "RoFormer", 2021, in the half-split form of GPT-NeoX; QK-norm as in Qwen3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.platform import is_interpreted, runs_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)
MAX_HEAD_DIM = 256


def rope_kv_write_reference(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    *,
    layer: int,
    num_heads: int,
    eps: float = 1e-6,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, float32 inside."""
    _, num_kv_heads, _, _, block_size, head_dim = pool.shape
    queries = qkv[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
    written = (slot_mapping >= 0).nonzero()[:, 0]
    if not len(written):
        return queries
    heads = qkv[written].float().view(len(written), -1, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin[positions[written].long()][:, None].chunk(2, dim=-1)
    queries[written] = _rotated(_normed(q, q_norm, eps), cos, sin).to(qkv.dtype)
    slots = slot_mapping[written]
    blocks, offsets = slots // block_size, slots % block_size
    raw = pool.view(torch.uint8) if pool.dtype == FP8 else pool
    for index, (values, scale) in enumerate(
        ((_rotated(_normed(k, k_norm, eps), cos, sin), k_scale), (v, v_scale))
    ):
        stored = values if scale is None else values / scale[:, None]
        if pool.dtype == FP8:
            stored = stored.nan_to_num(nan=0.0).clamp(-FP8_MAX.value, FP8_MAX.value)
            raw[blocks, :, layer, index, offsets] = stored.to(FP8).view(torch.uint8)
        else:
            raw[blocks, :, layer, index, offsets] = stored.to(pool.dtype)
    return queries


def _normed(heads: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is None:
        return heads
    return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * gain.float()


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Tile(NamedTuple):
    query_heads: int
    """Query heads of one program; powers of two."""
    kv_heads: int
    """Key heads, and as many value heads, of one program."""
    num_warps: int


def _tile(num_tokens: int, num_heads: int, num_kv_heads: int, half: int) -> Tile:
    """Keys and values in 16-byte accesses of 16-bit elements, twice as many of them for queries.

    Few tokens are cut finer to reach more SMs; many share a token's angles among more heads.
    """
    columns: int = triton.next_power_of_2(half)
    most = max((1024 if num_tokens >= 512 else 256) // columns, 1)
    kv_heads = _heads_per_program(num_kv_heads, most)
    num_warps = min(max(kv_heads * columns // 256, 1), 4)
    most = max(num_warps * 512 // columns, 1)
    return Tile(_heads_per_program(num_heads, most), kv_heads, num_warps)


def _heads_per_program(num_heads: int, most: int) -> int:
    """A power of two up to `most`: the largest that leaves no program partly idle, from 4 on."""
    size = most
    while size > 4 and num_heads % size:
        size //= 2
    while size >= 2 * num_heads:
        size //= 2
    return size


@triton.jit
def _load_rotated(
    head_ptrs,  # [HEADS, BLOCK_HALF], first halves
    mask,
    cos,  # [1, BLOCK_HALF]
    sin,
    norm_ptr,  # [2 * HALF] or None
    columns,  # [1, BLOCK_HALF]
    eps,
    HALF: tl.constexpr,
):
    first = tl.load(head_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(head_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        is_column = columns < HALF
        mean_square = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        rstd = tl.rsqrt(mean_square + eps)[:, None]
        first_gain = tl.load(norm_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        second_gain = tl.load(norm_ptr + HALF + columns, mask=is_column, other=0.0).to(tl.float32)
        first = first * rstd * first_gain
        second = second * rstd * second_gain
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_kv(
    pool_ptrs,  # [HEADS, BLOCK_HALF], first halves
    first,
    second,
    scale_ptr,  # [NUM_KV_HEADS] or None
    heads,  # [HEADS, 1]
    mask,
    HALF: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
):
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + heads, mask=heads < NUM_KV_HEADS, other=1.0)
        first = first / scale
        second = second / scale
    element: tl.constexpr = pool_ptrs.dtype.element_ty
    if element == tl.float8e4nv:
        first = tl.where(first == first, tl.clamp(first, -FP8_MAX, FP8_MAX), 0.0)
        second = tl.where(second == second, tl.clamp(second, -FP8_MAX, FP8_MAX), 0.0)
    tl.store(pool_ptrs, first.to(element), mask=mask)
    tl.store(pool_ptrs + HALF, second.to(element), mask=mask)


@triton.jit
def _rope_kv_write_kernel(
    qkv_ptr,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF]
    positions_ptr,  # [num_tokens]
    cos_sin_ptr,  # [max_positions, 2 * HALF]
    pool_ptr,  # [num_blocks, NUM_KV_HEADS, num_layers, 2, BLOCK_SIZE, 2 * HALF], at the layer
    slot_mapping_ptr,  # [num_tokens]
    q_norm_ptr,  # [2 * HALF] or None
    k_norm_ptr,  # [2 * HALF] or None
    k_scale_ptr,  # [NUM_KV_HEADS] or None
    v_scale_ptr,  # [NUM_KV_HEADS] or None
    qkv_stride: tl.int64,
    cos_sin_stride: tl.int64,
    block_stride: tl.int64,
    head_stride: tl.int64,
    value_stride: tl.int64,
    offset_stride: tl.int64,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # One program a (token, part of its heads): first the query parts, then the key-value parts.
    query_parts: tl.constexpr = (NUM_HEADS + QUERY_HEADS - 1) // QUERY_HEADS
    parts: tl.constexpr = query_parts + (NUM_KV_HEADS + KV_HEADS - 1) // KV_HEADS
    token = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    columns = tl.arange(0, BLOCK_HALF)[None, :]  # [1, BLOCK_HALF]
    is_column = columns < HALF
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    is_token = slot >= 0
    # Not a branch on the slot: its load and those of the position and the row run side by side.
    position = tl.where(is_token, tl.load(positions_ptr + token).to(tl.int64), 0)
    cos_ptrs = cos_sin_ptr + position * cos_sin_stride + columns
    cos = tl.load(cos_ptrs, mask=is_column, other=0.0)  # [1, BLOCK_HALF]
    sin = tl.load(cos_ptrs + HALF, mask=is_column, other=0.0)
    row_ptr = qkv_ptr + token * qkv_stride
    if part < query_parts:
        query_heads = part * QUERY_HEADS + tl.arange(0, QUERY_HEADS)[:, None]  # [QUERY_HEADS, 1]
        is_query = (query_heads < NUM_HEADS) & is_column
        query_ptrs = row_ptr + query_heads * (2 * HALF) + columns
        query, query_end = _load_rotated(
            query_ptrs, is_query, cos, sin, q_norm_ptr, columns, eps, HALF
        )
        element: tl.constexpr = qkv_ptr.dtype.element_ty
        tl.store(query_ptrs, query.to(element), mask=is_query & is_token)
        tl.store(query_ptrs + HALF, query_end.to(element), mask=is_query & is_token)
    else:
        heads = (part - query_parts) * KV_HEADS + tl.arange(0, KV_HEADS)[:, None]  # [KV_HEADS, 1]
        is_key = (heads < NUM_KV_HEADS) & is_column
        key_ptrs = row_ptr + (NUM_HEADS + heads) * (2 * HALF) + columns
        value_ptrs = key_ptrs + NUM_KV_HEADS * 2 * HALF
        value = tl.load(value_ptrs, mask=is_key, other=0.0).to(tl.float32)
        value_end = tl.load(value_ptrs + HALF, mask=is_key, other=0.0).to(tl.float32)
        key, key_end = _load_rotated(key_ptrs, is_key, cos, sin, k_norm_ptr, columns, eps, HALF)
        block = tl.where(is_token, slot // BLOCK_SIZE, 0)
        slot_ptr = pool_ptr + block * block_stride + (slot % BLOCK_SIZE) * offset_stride
        pool_ptrs = slot_ptr + heads.to(tl.int64) * head_stride + columns
        is_key = is_key & is_token
        _store_kv(pool_ptrs, key, key_end, k_scale_ptr, heads, is_key, HALF, NUM_KV_HEADS)
        pool_ptrs += value_stride
        _store_kv(pool_ptrs, value, value_end, v_scale_ptr, heads, is_key, HALF, NUM_KV_HEADS)


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    *,
    layer: int,
    num_heads: int,
    eps: float = 1e-6,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """Rotate queries in place, write keys and values; shapes as in the module's header.

    Returns the queries, a view [num_tokens, num_heads, head_dim] into qkv. No two tokens may have
    the same slot. Raises ValueError on what the kernel does not take.
    """
    options = {"q_norm": q_norm, "k_norm": k_norm, "k_scale": k_scale, "v_scale": v_scale}
    _check(qkv, positions, cos_sin, pool, slot_mapping, layer, num_heads)
    check_options(qkv, pool, options)
    _, num_kv_heads, _, _, block_size, head_dim = pool.shape
    num_tokens, half = qkv.shape[0], head_dim // 2
    queries = qkv[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    if not num_tokens:
        return queries
    if not runs_triton(qkv):
        return rope_kv_write_reference(
            qkv, positions, cos_sin, pool, slot_mapping,
            layer=layer, num_heads=num_heads, eps=eps, **options,
        )  # fmt: skip
    tile = _tile(num_tokens, num_heads, num_kv_heads, half)
    query_parts = triton.cdiv(num_heads, tile.query_heads)
    parts = query_parts + triton.cdiv(num_kv_heads, tile.kv_heads)
    use_pdl = launch_pdl and not is_interpreted()
    _rope_kv_write_kernel[(num_tokens * parts,)](
        qkv,
        positions,
        cos_sin,
        pool[:, :, layer],
        slot_mapping,
        q_norm,
        k_norm,
        k_scale,
        v_scale,
        qkv.stride(0),
        cos_sin.stride(0),
        pool.stride(0),
        pool.stride(1),
        pool.stride(3),
        pool.stride(4),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_SIZE=block_size,
        QUERY_HEADS=tile.query_heads,
        KV_HEADS=tile.kv_heads,
        USE_PDL=use_pdl,
        num_warps=tile.num_warps,
        launch_pdl=use_pdl,
    )
    return queries


def _check(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    layer: int,
    num_heads: int,
) -> None:
    if pool.dim() != 6 or pool.shape[3] != 2 or pool.stride(5) != 1:
        raise ValueError(
            f"pool is {list(pool.shape)}; give [num_blocks, num_kv_heads, num_layers, 2, "
            f"block_size, head_dim] with contiguous rows"
        )
    _, num_kv_heads, num_layers, _, block_size, head_dim = pool.shape
    if head_dim % 2 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; an even number 16..{MAX_HEAD_DIM} is supported")
    if block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}; give a power of two")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} is outside the pool's 0..{num_layers - 1}")
    if qkv.dtype not in DTYPES or pool.dtype not in (qkv.dtype, FP8):
        raise ValueError(
            f"qkv is {qkv.dtype} and the pool {pool.dtype}; give a 16- or 32-bit float and a pool "
            f"of the same dtype or {FP8}"
        )
    check_new_tokens(qkv, positions, cos_sin, slot_mapping, num_heads, num_kv_heads, head_dim)
    if pool.device != qkv.device:
        raise ValueError(f"pool is on {pool.device}, qkv on {qkv.device}; move it there")


def check_new_tokens(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Raises ValueError for rows that cannot be rotated and stored."""
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != width or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv is {list(qkv.shape)} with strides {list(qkv.stride())}; give contiguous rows of "
            f"{width} for {num_heads} query and {num_kv_heads} KV heads of {head_dim}"
        )
    if cos_sin.dim() != 2 or cos_sin.shape[1] != head_dim or cos_sin.stride(1) != 1:
        raise ValueError(f"cos_sin is {list(cos_sin.shape)}; give [max_positions, {head_dim}]")
    if cos_sin.dtype != torch.float32:
        raise ValueError(f"cos_sin is {cos_sin.dtype}; give float32")
    if {positions.dtype, slot_mapping.dtype} - {torch.int32, torch.int64}:
        raise ValueError(
            f"positions are {positions.dtype}, slot_mapping {slot_mapping.dtype}; "
            "give int32 or int64"
        )
    for name, values in (("positions", positions), ("slot_mapping", slot_mapping)):
        if values.shape != qkv.shape[:1] or not values.is_contiguous():
            raise ValueError(f"{name} is {list(values.shape)}; give contiguous [{qkv.shape[0]}]")
    for name, tensor in (
        ("positions", positions),
        ("cos_sin", cos_sin),
        ("slot_mapping", slot_mapping),
    ):
        if tensor.device != qkv.device:
            raise ValueError(f"{name} is on {tensor.device}, qkv on {qkv.device}; move it there")


def check_options(qkv: Tensor, pool: Tensor, options: dict[str, Tensor | None]) -> None:
    """The norms' gains and the pool's scales."""
    for name, values in options.items():
        if values is None:
            continue
        length = pool.shape[5] if name.endswith("norm") else pool.shape[1]
        if values.shape != (length,) or not values.is_contiguous():
            raise ValueError(f"{name} is {list(values.shape)}; give a contiguous [{length}]")
        if values.device != qkv.device:
            raise ValueError(f"{name} is on {values.device}, qkv on {qkv.device}; move it there")
        if name.endswith("scale") and values.dtype != torch.float32:
            raise ValueError(f"{name} is {values.dtype}; give float32")
