"""Pieces of blocks moved between two pools of different shapes, one perhaps on another GPU.

    for every entry i and piece e:
        dst[at(dst, i, e)] = src[at(src, i, e)]                          piece_bytes of them
        at(pool, i, e) = (u // n) * block_bytes + offsets[u % n, e]
        u = units[i], n = units_per_block

So a block may be divided into n units of fewer tokens, and of each unit any pieces of one length
are moved: all of it, a range of heads, or the rows of each head where blocks differ in size. One
launch moves all entries. Pools are given by their addresses, since the memory of another process
that is mapped here belongs to no tensor of ours.

Bytes: num entries * num pieces * piece_bytes * 2. Bound: the link to the other GPU.
Assumes that units are in range and that no piece is written twice. Limits: offsets inside a pool
may pass 2^31; 16 bytes a thread and access where all addresses and lengths are multiples of 16,
else 4 or 1.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.platform import runs_triton

MAX_PROGRAMS = 30
"""Just under 1 MiB under way, which is enough for NVLink: more programs copy no faster, and take
more from other work on both GPUs."""


@dataclass(frozen=True, slots=True)
class CopyTile:
    """What a program moves at a time: a part of a long piece, or several short ones."""

    num_bytes: int = 32768
    num_warps: int = 8
    """256 threads with eight 16-byte loads each under way."""


TILE = CopyTile()


def candidate_tiles() -> list[CopyTile]:
    """What is worth timing: one to eight 16-byte loads a thread."""
    return [
        CopyTile(num_bytes, num_warps)
        for num_bytes in (8192, 16384, 32768, 65536)
        for num_warps in (4, 8, 16)
        if 1 <= num_bytes // (num_warps * 32 * 16) <= 8
    ]


@dataclass(frozen=True, slots=True, eq=False)
class PieceSide:
    """One pool, and where the pieces of a unit lie in its blocks. See `make_side`."""

    address: int
    block_bytes: int
    piece_bytes: int
    offsets: Tensor
    """[units_per_block, num_pieces] int64, on the device that copies."""
    alignment: int
    """16, 4 or 1: divides the address of every piece, and its length."""


def make_side(
    address: int, offsets: Tensor, *, block_bytes: int, piece_bytes: int, device: torch.device
) -> PieceSide:
    """`offsets` [units_per_block, num_pieces] int64 in host memory.

    Raises ValueError when a piece would leave its block.
    """
    if offsets.dim() != 2 or offsets.dtype != torch.int64 or offsets.device.type != "cpu":
        raise ValueError(
            f"offsets are {list(offsets.shape)} {offsets.dtype} on {offsets.device}; "
            "give [units_per_block, num_pieces] int64 on cpu"
        )
    if not offsets.numel() or piece_bytes < 1:
        raise ValueError(f"{offsets.numel()} pieces of {piece_bytes} bytes; give at least 1 of 1")
    first, last = int(offsets.min()), int(offsets.max())
    if first < 0 or last + piece_bytes > block_bytes:
        raise ValueError(
            f"pieces of bytes {first} to {last + piece_bytes} leave their block of "
            f"{block_bytes} bytes"
        )
    common = math.gcd(address, block_bytes, piece_bytes, *offsets.flatten().tolist())
    alignment = next(size for size in (16, 4, 1) if common % size == 0)
    return PieceSide(address, block_bytes, piece_bytes, offsets.to(device), alignment)


def copy_pieces_reference(
    src: PieceSide, dst: PieceSide, *, src_units: Tensor, dst_units: Tensor
) -> None:
    """The same for host memory, piece by piece."""
    for src_unit, dst_unit in zip(src_units.tolist(), dst_units.tolist(), strict=True):
        sources, targets = _addresses(src, src_unit), _addresses(dst, dst_unit)
        for source, target in zip(sources, targets, strict=True):
            ctypes.memmove(target, source, src.piece_bytes)


def _addresses(side: PieceSide, unit: int) -> list[int]:
    units_per_block = len(side.offsets)
    start = side.address + unit // units_per_block * side.block_bytes
    return [start + offset for offset in side.offsets[unit % units_per_block].tolist()]


@triton.jit
def _piece_addresses(
    address,
    block_bytes,
    offsets_ptr,  # [UNITS_PER_BLOCK, NUM_PIECES]
    units_ptr,  # [num_entries]
    entries,  # [P]
    pieces,  # [P]
    is_piece,  # [P]
    UNITS_PER_BLOCK: tl.constexpr,
    NUM_PIECES: tl.constexpr,
):
    units = tl.load(units_ptr + entries, mask=is_piece, other=0).to(tl.int64)  # [P]
    rows = (units % UNITS_PER_BLOCK) * NUM_PIECES + pieces  # [P]
    offsets = tl.load(offsets_ptr + rows, mask=is_piece, other=0)  # [P]
    return address + (units // UNITS_PER_BLOCK) * block_bytes + offsets


# One compilation for lists of all lengths and places.
@triton.jit(do_not_specialize=["num_entries", "src_units_ptr", "dst_units_ptr"])
def _copy_pieces_kernel(
    src_address: tl.int64,
    dst_address: tl.int64,
    src_offsets_ptr,  # [SRC_UNITS_PER_BLOCK, NUM_PIECES]
    dst_offsets_ptr,  # [DST_UNITS_PER_BLOCK, NUM_PIECES]
    src_units_ptr,  # [num_entries]
    dst_units_ptr,  # [num_entries]
    src_block_bytes: tl.int64,
    dst_block_bytes: tl.int64,
    num_entries,
    SRC_UNITS_PER_BLOCK: tl.constexpr,
    DST_UNITS_PER_BLOCK: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORD: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    # Persistent: programs stride over tiles of P pieces, or of W words of one long piece.
    tiles_per_piece: tl.constexpr = (NUM_WORDS + W - 1) // W
    num_pieces = num_entries.to(tl.int64) * NUM_PIECES
    num_tiles = ((num_pieces + P - 1) // P) * tiles_per_piece
    for index in range(tl.program_id(0).to(tl.int64), num_tiles, tl.num_programs(0)):
        numbers = (index // tiles_per_piece) * P + tl.arange(0, P)  # [P]
        words = (index % tiles_per_piece) * W + tl.arange(0, W)  # [W]
        is_piece = numbers < num_pieces  # [P]
        entries, pieces = numbers // NUM_PIECES, numbers % NUM_PIECES  # [P]
        sources = _piece_addresses(
            src_address,
            src_block_bytes,
            src_offsets_ptr,
            src_units_ptr,
            entries,
            pieces,
            is_piece,
            SRC_UNITS_PER_BLOCK,
            NUM_PIECES,
        ).to(tl.pointer_type(WORD))
        targets = _piece_addresses(
            dst_address,
            dst_block_bytes,
            dst_offsets_ptr,
            dst_units_ptr,
            entries,
            pieces,
            is_piece,
            DST_UNITS_PER_BLOCK,
            NUM_PIECES,
        ).to(tl.pointer_type(WORD))
        if IS_ALIGNED:
            sources = tl.multiple_of(sources, 16)
            targets = tl.multiple_of(targets, 16)
        is_moved = is_piece[:, None] & (words < NUM_WORDS)[None, :]  # [P, W]
        values = tl.load(sources[:, None] + words[None, :], mask=is_moved, other=0)
        tl.store(targets[:, None] + words[None, :], values, mask=is_moved)


class _Shape(NamedTuple):
    pieces: int
    words: int


def _shape(tile: CopyTile, num_words: int, word_bytes: int) -> _Shape:
    tile_words = tile.num_bytes // word_bytes
    words = min(tile_words, triton.next_power_of_2(num_words))
    return _Shape(tile_words // words, words)


def copy_pieces(
    src: PieceSide,
    dst: PieceSide,
    *,
    src_units: Tensor,
    dst_units: Tensor,
    max_programs: int = MAX_PROGRAMS,
    tile: CopyTile = TILE,
) -> None:
    """Copy the pieces of unit src_units[i] to those of unit dst_units[i], in one launch.

    src_units, dst_units [num_entries] int32, on the device that copies. `max_programs` bounds the
    share of the GPU that a copy beside other work takes. Raises ValueError on what does not fit.
    """
    _check(src, dst, src_units, dst_units)
    if max_programs < 1:
        raise ValueError(f"max_programs is {max_programs}; give at least 1")
    if not len(src_units):
        return
    if runs_triton(src_units):
        _launch(src, dst, src_units, dst_units, max_programs, tile)
    else:
        copy_pieces_reference(src, dst, src_units=src_units, dst_units=dst_units)


class CompiledPieces:
    """`copy_pieces` between two sides, without looking for the code and its arguments each time."""

    def __init__(self, src: PieceSide, dst: PieceSide, *, max_programs: int) -> None:
        """Compiles, by a launch that moves nothing: takes seconds for a pair of shapes that was
        never met. Raises ValueError as `copy_pieces`."""
        none = torch.empty(0, dtype=torch.int32, device=dst.offsets.device)
        _check(src, dst, none, none)
        self._sides = (src, dst)
        self._max_programs = max_programs
        self._kernel = None
        if runs_triton(none):
            # The interpreter gives no code that could be launched by itself.
            self._kernel = _launch(src, dst, none, none, 1, TILE)

    def launch(self, src_units: Tensor, dst_units: Tensor) -> None:
        """Lists as `copy_pieces` takes them, not empty and not checked."""
        src, dst = self._sides
        if self._kernel is None:
            copy_pieces(
                src,
                dst,
                src_units=src_units,
                dst_units=dst_units,
                max_programs=self._max_programs,
            )
            return
        grid, arguments, constants = _call(src, dst, src_units, dst_units, self._max_programs, TILE)
        self._kernel[(grid, 1, 1)](*arguments, *constants.values())


def _launch(
    src: PieceSide,
    dst: PieceSide,
    src_units: Tensor,
    dst_units: Tensor,
    max_programs: int,
    tile: CopyTile,
) -> Any:
    """The code that was launched; None from the interpreter."""
    grid, arguments, constants = _call(src, dst, src_units, dst_units, max_programs, tile)
    return _copy_pieces_kernel[(grid,)](*arguments, **constants, num_warps=tile.num_warps)


def _call(
    src: PieceSide,
    dst: PieceSide,
    src_units: Tensor,
    dst_units: Tensor,
    max_programs: int,
    tile: CopyTile,
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Number of programs, arguments, and constants in the order of the kernel's signature."""
    num_entries, num_pieces = len(src_units), src.offsets.shape[1]
    alignment = min(src.alignment, dst.alignment)
    word_bytes = min(alignment, 4)
    num_words = src.piece_bytes // word_bytes
    shape = _shape(tile, num_words, word_bytes)
    num_tiles = triton.cdiv(num_entries * num_pieces, shape.pieces) * triton.cdiv(
        num_words, shape.words
    )
    arguments = (
        src.address,
        dst.address,
        src.offsets,
        dst.offsets,
        src_units,
        dst_units,
        src.block_bytes,
        dst.block_bytes,
        num_entries,
    )
    constants = {
        "SRC_UNITS_PER_BLOCK": len(src.offsets),
        "DST_UNITS_PER_BLOCK": len(dst.offsets),
        "NUM_PIECES": num_pieces,
        "NUM_WORDS": num_words,
        "WORD": tl.int32 if word_bytes == 4 else tl.uint8,
        "P": shape.pieces,
        "W": shape.words,
        "IS_ALIGNED": alignment == 16,
    }
    return max(1, min(num_tiles, max_programs)), arguments, constants


def _check(src: PieceSide, dst: PieceSide, src_units: Tensor, dst_units: Tensor) -> None:
    shapes = [(side.piece_bytes, side.offsets.shape[1]) for side in (src, dst)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"units have {shapes[0][1]} pieces of {shapes[0][0]} bytes in src and "
            f"{shapes[1][1]} of {shapes[1][0]} in dst; give equal ones"
        )
    device = dst.offsets.device
    for name, units in (("src_units", src_units), ("dst_units", dst_units)):
        if units.dim() != 1 or units.dtype != torch.int32 or not units.is_contiguous():
            raise ValueError(f"{name} is {list(units.shape)} {units.dtype}; give [n] int32")
        if units.device != device or src.offsets.device != device:
            raise ValueError(f"{name} is on {units.device}, offsets on {src.offsets.device}")
    if len(src_units) != len(dst_units):
        raise ValueError(f"{len(src_units)} source units for {len(dst_units)} target units")
