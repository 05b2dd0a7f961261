"""Whole KV blocks moved between pools, or between a pool and contiguous staging memory.

    copy:    dst[dst_ids[i]] = src[src_ids[i]]
    gather:  staging[i] = pool[ids[i]]
    scatter: pool[ids[i]] = staging[i]

A pool is any tensor [num_blocks, ...] whose blocks are each contiguous; the distance between
blocks is free. So a range of heads of every block is moved by slicing: `pool[:, 2:4]` is such a
tensor, and the two sides may be slices of pools with different numbers of heads. Contents are
only moved, as 4-byte words where lengths allow (16 bytes a thread and access), bytes otherwise.
An entry whose source or destination id is negative is skipped. Nothing here knows who owns
blocks: within one call no block may be a destination twice, or source and destination at once.

Bytes: num entries * block bytes * 2. Bound: copy bandwidth, or the link when one side is another
GPU's mapped memory.
Limits: offsets inside a pool may pass 2^31 words.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.platform import is_interpreted, runs_triton

TILE_BYTES = 16384
NUM_WARPS = 8
"""256 threads with four 16-byte loads each under way."""
MAX_PROGRAMS = 132 * 8
"""As many programs of 8 warps as an H200 holds at once; each walks over its share of the tiles."""


def copy_blocks_reference(
    src: Tensor, dst: Tensor, *, src_ids: Tensor | None = None, dst_ids: Tensor | None = None
) -> None:
    """The same in plain torch. An id list of None stands for 0, 1, 2, ..."""
    num_entries = _num_entries(src, dst, src_ids, dst_ids)
    identity = torch.arange(num_entries, device=src.device)
    sources = identity if src_ids is None else src_ids.long()
    targets = identity if dst_ids is None else dst_ids.long()
    is_moved = (sources >= 0) & (targets >= 0)
    as_bytes = src.view(torch.uint8)[sources[is_moved]]
    dst.view(torch.uint8)[targets[is_moved].to(dst.device)] = as_bytes.to(dst.device)


@triton.jit(do_not_specialize=["num_entries"])
def _copy_blocks_kernel(
    src_ptr,  # [num_src_blocks, NUM_WORDS]
    dst_ptr,  # [num_dst_blocks, NUM_WORDS]
    src_ids_ptr,  # [num_entries] or None
    dst_ids_ptr,  # [num_entries] or None
    src_stride: tl.int64,
    dst_stride: tl.int64,
    num_entries,
    NUM_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # Persistent: programs stride over (entry, tile of the block); tiles of an entry are neighbours.
    tiles_per_block: tl.constexpr = (NUM_WORDS + TILE - 1) // TILE
    num_tiles = num_entries.to(tl.int64) * tiles_per_block
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    for index in range(tl.program_id(0).to(tl.int64), num_tiles, tl.num_programs(0)):
        entry = index // tiles_per_block
        words = (index % tiles_per_block) * TILE + tl.arange(0, TILE)  # [TILE]
        src_block = entry
        if src_ids_ptr is not None:
            src_block = tl.load(src_ids_ptr + entry).to(tl.int64)
        dst_block = entry
        if dst_ids_ptr is not None:
            dst_block = tl.load(dst_ids_ptr + entry).to(tl.int64)
        is_moved = (words < NUM_WORDS) & (src_block >= 0) & (dst_block >= 0)
        values = tl.load(src_ptr + src_block * src_stride + words, mask=is_moved, other=0)
        tl.store(dst_ptr + dst_block * dst_stride + words, values, mask=is_moved)


def copy_blocks(
    src: Tensor,
    dst: Tensor,
    *,
    src_ids: Tensor | None = None,
    dst_ids: Tensor | None = None,
    max_programs: int = MAX_PROGRAMS,
    launch_pdl: bool = False,
) -> None:
    """Copy block src_ids[i] of `src` to block dst_ids[i] of `dst`; None stands for 0, 1, 2, ...

    src, dst [num_blocks, ...] of one dtype and block shape; they may be the same pool. ids
    [num_entries] int32 or int64, in range or negative (skipped). `max_programs` bounds the share
    of the GPU that a copy beside other work takes. Raises ValueError on what does not fit.
    """
    num_entries = _check(src, dst, src_ids, dst_ids)
    if max_programs < 1:
        raise ValueError(f"max_programs is {max_programs}; give at least 1")
    block_bytes = math.prod(src.shape[1:]) * src.element_size()
    if not num_entries or not block_bytes:
        return
    if not runs_triton(src):
        copy_blocks_reference(src, dst, src_ids=src_ids, dst_ids=dst_ids)
        return
    src_words, dst_words = _as_words(src, dst)
    num_words = src_words.shape[1]
    tile = min(TILE_BYTES // src_words.element_size(), triton.next_power_of_2(num_words))
    num_programs = min(num_entries * triton.cdiv(num_words, tile), max_programs)
    use_pdl = launch_pdl and not is_interpreted()
    _copy_blocks_kernel[(num_programs,)](
        src_words,
        dst_words,
        src_ids,
        dst_ids,
        src_words.stride(0),
        dst_words.stride(0),
        num_entries,
        NUM_WORDS=num_words,
        TILE=tile,
        USE_PDL=use_pdl,
        num_warps=NUM_WARPS,
        launch_pdl=use_pdl,
    )


def gather_blocks(
    pool: Tensor,
    ids: Tensor,
    *,
    out: Tensor | None = None,
    max_programs: int = MAX_PROGRAMS,
    launch_pdl: bool = False,
) -> Tensor:
    """pool[ids] as contiguous [num_ids, ...]; entries of negative ids keep what `out` holds."""
    if out is None:
        out = torch.empty((ids.shape[0], *pool.shape[1:]), dtype=pool.dtype, device=pool.device)
    copy_blocks(pool, out, src_ids=ids, max_programs=max_programs, launch_pdl=launch_pdl)
    return out


def scatter_blocks(
    staging: Tensor,
    pool: Tensor,
    ids: Tensor,
    *,
    max_programs: int = MAX_PROGRAMS,
    launch_pdl: bool = False,
) -> None:
    """pool[ids[i]] = staging[i]; negative ids are skipped."""
    copy_blocks(staging, pool, dst_ids=ids, max_programs=max_programs, launch_pdl=launch_pdl)


def _as_words(src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [num_blocks, num_words] of the widest word that divides every length and offset."""
    word = torch.int32
    for tensor in (src, dst):
        size = tensor.element_size()
        lengths = (math.prod(tensor.shape[1:]) * size, tensor.stride(0) * size, tensor.data_ptr())
        if any(length % word.itemsize for length in lengths):
            word = torch.uint8
    width = math.prod(src.shape[1:])
    return src.view(len(src), width).view(word), dst.view(len(dst), width).view(word)


def _num_entries(src: Tensor, dst: Tensor, src_ids: Tensor | None, dst_ids: Tensor | None) -> int:
    lengths = {len(ids) for ids in (src_ids, dst_ids) if ids is not None}
    if not lengths:
        lengths = {len(src)}
    if len(lengths) > 1:
        raise ValueError(f"src_ids and dst_ids have lengths {sorted(lengths)}; give equal ones")
    (num_entries,) = lengths
    for name, tensor, ids in (("src", src, src_ids), ("dst", dst, dst_ids)):
        if ids is None and len(tensor) < num_entries:
            raise ValueError(f"{name} has {len(tensor)} blocks for {num_entries} entries; give ids")
    return num_entries


def _check(src: Tensor, dst: Tensor, src_ids: Tensor | None, dst_ids: Tensor | None) -> int:
    """Number of entries."""
    if src.dtype != dst.dtype or src.shape[1:] != dst.shape[1:]:
        raise ValueError(
            f"blocks are {list(src.shape[1:])} {src.dtype} in src and "
            f"{list(dst.shape[1:])} {dst.dtype} in dst; give equal ones"
        )
    for name, tensor in (("src", src), ("dst", dst)):
        if tensor.dim() < 2 or (len(tensor) and not tensor[0].is_contiguous()):
            raise ValueError(
                f"{name} is {list(tensor.shape)} with strides {list(tensor.stride())}; "
                f"give [num_blocks, ...] with contiguous blocks"
            )
    for name, ids in (("src_ids", src_ids), ("dst_ids", dst_ids)):
        if ids is None:
            continue
        if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {list(ids.shape)} {ids.dtype}; give [n] int32 or int64")
        if not ids.is_contiguous() or ids.device != dst.device:
            raise ValueError(f"{name} is on {ids.device}; give it contiguous on {dst.device}")
    return _num_entries(src, dst, src_ids, dst_ids)
