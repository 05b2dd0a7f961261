"""Attention of one new token a sequence over its paged context (flash-decoding, balanced).

    out = softmax(mask(cap(scale * q K^T))) V,   cap(s) = soft_cap * tanh(s / soft_cap)

query [num_seqs, num_heads, head_dim], pool [num_blocks, num_kv_heads, num_layers, 2, block_size,
head_dim], block_tables [num_seqs, max_blocks_per_seq], seq_lens [num_seqs] -> out like query.

Bytes: 2 * sum(seq_lens) * num_kv_heads * head_dim * pool.element_size() (K and V, read once) plus
the queries and outputs; FLOPs: 4 * sum(seq_lens) * num_heads * head_dim. Bound by memory.
Source: Dao et al., "Flash-Decoding for long-context inference"; the even division of all tiles
over a fixed number of programs is Osama et al., "Stream-K" (PPoPP 2023).

All query heads of a KV head are rows of one product, so K and V are read once. The tiles of all
(sequence, KV head) pairs form one line that is cut into equal shares, one a program: the grid
depends on the device and the tile alone and a captured graph serves any lengths; a lone long
sequence fills the GPU, and unequal lengths leave no program idle. Where it comes out nearly even,
each pair has programs of its own. A pair cut by the end of a share is finished by whichever of its
programs comes last: each writes its part and counts itself, the last one sums all parts in the
order of the line (so runs are equal) and sets the counter back to zero. No program waits for
another.

Assumes head_dim contiguous in query, pool and out; never reads a slot past a sequence's end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_arguments import (
    FP8,
    HOPPER_MULTIPROCESSORS,
    AttentionOptions,
    check_attention,
    compute_dtype,
    num_multiprocessors,
)
from kernels.attention_reference import attend, gather_kv
from kernels.decode_attention_kernel import decode_attention_kernel
from kernels.platform import is_interpreted, runs_triton

MAX_SEQS = 4096
"""Every program looks at all lengths at once."""
MOST_PROGRAMS_PER_SM = 4
PART_ELEMENTS = 8192
"""Of the parts that are merged at a time: 64 registers a thread, half of it where those are few."""
FEW_PAIRS = 16
"""(sequence, KV head) pairs up to which one program a multiprocessor is enough for 8-bit values."""
KV_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    FP8: tl.float8e4nv,
}


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How one program works through its share."""

    block_n: int
    """Tokens of one tile."""
    num_warps: int
    num_stages: int
    """Tiles of K and V in flight or in use."""
    programs_per_sm: int
    min_tiles: int
    """Pairs of so many tiles, on average, are not divided: merging costs more than it saves."""
    max_registers: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Buffers of the parts that programs pass to each other; one serves all layers in turn."""

    partial_out: Tensor
    """[2 * num_programs, group, head_dim] float32: a share cuts at most one pair at each end."""
    partial_lse: Tensor
    """[2 * num_programs, group] float32."""
    arrivals: Tensor
    """[num_seqs * num_kv_heads] int32, zero between calls."""

    @property
    def num_programs(self) -> int:
        return self.partial_lse.shape[0] // 2


def decode_attention_reference(
    query: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    layer: int,
    scale: float = 1.0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The formula above, one sequence at a time; reads the lengths on the host."""
    if out is None:
        out = torch.empty_like(query)
    for seq, seq_len in enumerate(seq_lens.tolist()):
        if seq_len == 0:
            out[seq] = 0
            if lse is not None:
                lse[seq] = float("-inf")
            continue
        keys, values = gather_kv(pool, block_tables[seq], seq_len, layer, k_scale, v_scale)
        result, log_total = attend(
            query[seq : seq + 1],
            keys,
            values,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
        )
        out[seq] = result[0].to(out.dtype)
        if lse is not None:
            lse[seq] = log_total[0]
    return out


def _tile(head_dim: int, element_bytes: int, group: int, num_pairs: int) -> DecodeTile:
    """About 32 KiB of K and V a 16-bit tile; as many programs as there are pairs, up to four.

    Few programs have deep pipelines instead: each part to merge costs as much as some tiles.
    """
    if element_bytes == 4:
        # Products of float32 run outside the tensor cores and hold whole operands in registers.
        return DecodeTile(16, 4, 3, programs_per_sm=2, min_tiles=4)
    # 8-bit values are widened to 16 bits in the registers of the tensor cores' operands.
    block_n = min(64, max(16, 8192 // triton.next_power_of_2(head_dim)))
    is_fp8 = element_bytes == 1
    pairs_per_sm = triton.cdiv(num_pairs, HOPPER_MULTIPROCESSORS)
    if num_pairs <= FEW_PAIRS or (pairs_per_sm == 1 and not is_fp8):
        return DecodeTile(block_n, 4, 5, programs_per_sm=1, min_tiles=4)
    if pairs_per_sm <= 2 or group > 8:
        return DecodeTile(block_n, 4, 5 if is_fp8 else 3, programs_per_sm=2, min_tiles=2)
    if pairs_per_sm == 4 and head_dim <= 128:
        block_n = block_n if is_fp8 else max(16, block_n // 2)
        return DecodeTile(block_n, 4, 4, programs_per_sm=4, min_tiles=2, max_registers=128)
    num_stages = 4 if is_fp8 else 3
    return DecodeTile(block_n, 4, num_stages, programs_per_sm=3, min_tiles=2, max_registers=168)


def candidate_tiles(
    head_dim: int, element_bytes: int, group: int, num_pairs: int
) -> list[DecodeTile]:
    """Tiles worth timing on a GPU for `num_pairs` (sequence, KV head); the table's own is first."""
    registers = {1: None, 2: None, 3: 168, 4: 128}
    tiles = [
        DecodeTile(
            block_n, num_warps, num_stages, programs_per_sm, min_tiles, registers[programs_per_sm]
        )
        for block_n, num_warps in ((32, 4), (64, 4), (128, 4), (128, 8))
        for num_stages in (2, 3, 4, 5)
        for programs_per_sm in ((1, 2) if num_warps == 8 else (1, 2, 3, 4))
        for min_tiles in (1, 4)
        if 2 * block_n * head_dim * element_bytes * (num_stages - 1) * programs_per_sm <= 208 * 1024
    ]
    return list(dict.fromkeys([_tile(head_dim, element_bytes, group, num_pairs), *tiles]))


def decode_workspace(
    query_shape: tuple[int, int, int],
    pool: Tensor,
    *,
    num_programs: int | None = None,
    tile: DecodeTile | None = None,
) -> DecodeWorkspace:
    """Buffers for queries up to [num_seqs, num_heads, head_dim] and one pool, on its device.

    8 * num_programs * group * (head_dim + 1) + 4 * num_seqs * num_kv_heads bytes. `num_programs`
    is the largest grid that decode_attention will launch; None takes what suits the device, and
    any batch without a `tile`.
    """
    num_seqs, num_heads, head_dim = query_shape
    num_kv_heads = pool.shape[1]
    programs_per_sm = tile.programs_per_sm if tile else MOST_PROGRAMS_PER_SM
    num_programs = num_programs or num_multiprocessors(pool.device) * programs_per_sm
    shape = (2 * num_programs, num_heads // num_kv_heads)
    return DecodeWorkspace(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=pool.device),
        torch.empty(shape, dtype=torch.float32, device=pool.device),
        torch.zeros(num_seqs * num_kv_heads, dtype=torch.int32, device=pool.device),
    )


def decode_attention(
    query: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    layer: int,
    scale: float = 1.0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    tile: DecodeTile | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """query [num_seqs, num_heads, head_dim] -> the same shape; see the top of the file.

    `seq_lens` counts the new token, whose K and V are in the pool already; 0 marks a row without
    a sequence, which becomes zeros. `sliding_window` keys are seen, itself included (0: all).
    `sinks` [num_heads] and the scales [num_kv_heads] are float32; the scales multiply what a
    float8_e4m3fn pool stores. `lse` [num_seqs, num_heads] float32, if given, receives the natural
    logarithm of the softmax denominators, as merge_states takes it. Without `workspace` one is
    allocated. Raises ValueError for what the kernel does not take.
    """
    check_attention(
        query, pool, block_tables, seq_lens, layer=layer, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
    )  # fmt: skip
    num_seqs = query.shape[0]
    if block_tables.shape[0] != num_seqs or num_seqs > MAX_SEQS:
        raise ValueError(
            f"{num_seqs} queries for {block_tables.shape[0]} sequences: need one each, "
            f"at most {MAX_SEQS}"
        )
    if not runs_triton(query):
        return decode_attention_reference(
            query, pool, block_tables, seq_lens, layer=layer, scale=scale,
            sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks,
            k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
        )  # fmt: skip
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_seqs:
        options = AttentionOptions(layer, scale, sliding_window, soft_cap, sinks, k_scale, v_scale)
        launch_decode(
            query, pool, block_tables, seq_lens, options,
            out=out, lse=lse, workspace=workspace, tile=tile, launch_pdl=launch_pdl,
        )  # fmt: skip
    return out


class NewTokens(NamedTuple):
    """What rotates and stores the new tokens, where the kernel itself does so."""

    positions: Tensor
    cos_sin: Tensor
    slot_mapping: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


def launch_decode(
    rows: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    options: AttentionOptions,
    *,
    out: Tensor,
    lse: Tensor | None,
    workspace: DecodeWorkspace | None,
    tile: DecodeTile | None,
    launch_pdl: bool,
    new: NewTokens | None = None,
) -> None:
    """Launch on checked arguments; `rows` [num_seqs, heads, head_dim] begin with the queries."""
    num_seqs, num_heads, head_dim = out.shape
    num_kv_heads, block_size = pool.shape[1], pool.shape[4]
    group = num_heads // num_kv_heads
    num_pairs = num_seqs * num_kv_heads
    tile = tile or _tile(head_dim, pool.element_size(), group, num_pairs)
    workspace = workspace or decode_workspace((num_seqs, num_heads, head_dim), pool, tile=tile)
    _check_workspace(workspace, num_pairs, group, head_dim)
    most_tiles = num_pairs * triton.cdiv(block_tables.shape[1] * block_size, tile.block_n)
    is_paired = _is_paired(pool, rows.dtype)
    kv = pool[:, :, options.layer]
    if is_paired:
        kv = kv.view(torch.int16)
    # The tensor cores take 16 elements at least, pairs count as one.
    block_d = max(32 if is_paired else 16, triton.next_power_of_2(head_dim))
    block_r = triton.next_power_of_2(group)
    part_elements = PART_ELEMENTS // 2 if tile.max_registers else PART_ELEMENTS
    use_pdl = launch_pdl and not is_interpreted()
    most_programs = num_multiprocessors(pool.device) * tile.programs_per_sm
    decode_attention_kernel[(min(workspace.num_programs, most_programs),)](
        out,
        lse,
        rows,
        kv,
        block_tables,
        seq_lens,
        options.sinks,
        options.k_scale,
        options.v_scale,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.arrivals,
        new.positions if new else None,
        new.cos_sin if new else None,
        new.slot_mapping if new else None,
        new.q_norm if new else None,
        new.k_norm if new else None,
        num_seqs,
        tile.min_tiles,
        options.scale,
        options.soft_cap,
        options.sliding_window,
        new.eps if new else 0.0,
        out.stride(0),
        out.stride(1),
        rows.stride(0),
        rows.stride(1),
        *kv.stride()[:4],
        block_tables.stride(0),
        new.cos_sin.stride(0) if new else 0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        BLOCK_B=triton.next_power_of_2(num_seqs),
        BLOCK_G=max(16, block_r),
        BLOCK_R=block_r,
        BLOCK_S=min(16, max(1, part_elements // (block_r * block_d))),
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        HAS_WINDOW=options.sliding_window > 0,
        HAS_SOFT_CAP=options.soft_cap > 0,
        COMPUTE_DTYPE=compute_dtype(rows, pool),
        KV_DTYPE=KV_DTYPES[pool.dtype],
        PRECISION="ieee",
        IS_PAIRED=is_paired,
        INTERPRETED=is_interpreted(),
        TOKEN_ALIGNMENT=math.gcd(kv.stride(3), 16),
        # A share's bounds are products of tiles and programs; 64-bit division is slow.
        INDEX_DTYPE=tl.int32 if most_tiles * workspace.num_programs < 2**31 else tl.int64,
        NUM_STAGES=tile.num_stages,
        USE_PDL=use_pdl,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        launch_pdl=use_pdl,
    )


def _is_paired(pool: Tensor, query_dtype: torch.dtype) -> bool:
    """Whether 8-bit values are read two at a time: they begin at even places everywhere."""
    places = (pool.shape[5], pool.storage_offset(), *pool.stride()[:5])
    return pool.dtype == FP8 and query_dtype != torch.float32 and all(p % 2 == 0 for p in places)


def _check_workspace(workspace: DecodeWorkspace, num_pairs: int, group: int, head_dim: int) -> None:
    have = (*workspace.partial_out.shape[1:], workspace.arrivals.numel())
    need = (group, head_dim, num_pairs)
    if any(h < n for h, n in zip(have, need, strict=True)):
        raise ValueError(
            f"workspace is for (group, head_dim, pairs) {have}, needed is {need}; make it with "
            "decode_workspace for the largest batch"
        )
