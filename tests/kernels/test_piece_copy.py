from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compiler_process import run_compiling
from kernels.piece_copy import (
    TILE,
    PieceSide,
    candidate_tiles,
    copy_pieces,
    copy_pieces_reference,
    make_side,
)


def random_bytes(num_bytes: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device).random_(generator=generator)


def side_of(
    pool: Tensor, offsets: list[list[int]], block_bytes: int, piece_bytes: int
) -> PieceSide:
    return make_side(
        pool.data_ptr(),
        torch.tensor(offsets, dtype=torch.int64),
        block_bytes=block_bytes,
        piece_bytes=piece_bytes,
        device=pool.device,
    )


def units_of(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def moved(
    pools: tuple[Tensor, Tensor],
    sides: tuple[PieceSide, PieceSide],
    units: tuple[list[int], list[int]],
) -> Tensor:
    """dst as it is to be, moved piece by piece with indices of torch."""
    src, dst = pools[0], pools[1].clone()
    for unit, target in zip(*units, strict=True):
        places = []
        for side, number in zip(sides, (unit, target), strict=True):
            n = len(side.offsets)
            offsets = side.offsets[number % n].tolist()
            places.append([number // n * side.block_bytes + offset for offset in offsets])
        for here, there in zip(*places, strict=True):
            size = sides[0].piece_bytes
            dst[there : there + size] = src[here : here + size]
    return dst


CASES = {
    "whole blocks": ([[0]], 4096, [[0]], 4096, 4096),
    "long blocks": ([[0]], 40960, [[0]], 40960, 40960),
    "two of eight heads to one of two": ([[2048]], 8192, [[0]], 4096, 2048),
    "pieces of four tokens in blocks of sixteen": (
        [[0, 256, 512], [64, 320, 576], [128, 384, 640], [192, 448, 704]],
        768,
        [[0, 64, 128]],
        192,
        64,
    ),
    "to larger blocks": ([[0, 64]], 128, [[0, 128], [64, 192]], 256, 64),
    "pieces that are no power of two": ([[0, 640]], 1280, [[640, 1280]], 1920, 640),
    "four bytes": ([[4]], 12, [[0]], 4, 4),
    "lengths of odd bytes": ([[1, 9]], 17, [[0, 7]], 14, 7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_programs", [1, 1000])
def test_pieces_go_where_they_belong(case: str, max_programs: int, device: torch.device) -> None:
    src_offsets, src_block, dst_offsets, dst_block, piece = CASES[case]
    num_blocks = 12
    src = random_bytes(num_blocks * src_block, device, 0)
    dst = random_bytes(num_blocks * dst_block, device, 1)
    sides = (
        side_of(src, src_offsets, src_block, piece),
        side_of(dst, dst_offsets, dst_block, piece),
    )
    generator = torch.Generator().manual_seed(3)
    count = 11
    units = tuple(
        torch.randperm(num_blocks * len(offsets), generator=generator)[:count].tolist()
        for offsets in (src_offsets, dst_offsets)
    )
    expected = moved((src, dst), sides, units)  # type: ignore[arg-type]
    before = src.clone()
    copy_pieces(
        *sides,
        src_units=units_of(units[0], device),
        dst_units=units_of(units[1], device),
        max_programs=max_programs,
    )
    assert torch.equal(dst, expected)
    assert torch.equal(src, before)


def test_candidate_tiles_agree(device: torch.device) -> None:
    block, piece = 10240, 5120
    src, dst = random_bytes(8 * block, device, 0), random_bytes(8 * piece, device, 1)
    sides = side_of(src, [[block - piece]], block, piece), side_of(dst, [[0]], piece, piece)
    units = [5, 0, 2, 7, 1, 3, 6], [1, 2, 0, 4, 5, 7, 3]
    expected = moved((src, dst), sides, units)
    assert TILE in candidate_tiles()
    for tile in candidate_tiles():
        target = dst.clone()
        there = side_of(target, [[0]], piece, piece)
        copy_pieces(
            sides[0],
            there,
            src_units=units_of(units[0], device),
            dst_units=units_of(units[1], device),
            tile=tile,
        )
        assert torch.equal(target, expected), tile


def test_the_reference_is_the_same() -> None:
    cpu = torch.device("cpu")
    src, dst = random_bytes(1280, cpu, 0), random_bytes(1920, cpu, 1)
    sides = side_of(src, [[0, 640]], 1280, 640), side_of(dst, [[640, 1280]], 1920, 640)
    expected = moved((src, dst), sides, ([0], [0]))
    copy_pieces_reference(*sides, src_units=units_of([0], cpu), dst_units=units_of([0], cpu))
    assert torch.equal(dst, expected)


def test_what_is_known_of_the_addresses() -> None:
    cpu = torch.device("cpu")

    def alignment(address: int, offset: int, block_bytes: int, piece_bytes: int) -> int:
        offsets = torch.tensor([[offset]])
        side = make_side(
            address, offsets, block_bytes=block_bytes, piece_bytes=piece_bytes, device=cpu
        )
        return side.alignment

    assert alignment(1 << 20, 32, 256, 64) == 16
    assert alignment((1 << 20) + 4, 32, 256, 64) == 4
    assert alignment(1 << 20, 36, 256, 64) == 4
    assert alignment(1 << 20, 32, 256, 60) == 4
    assert alignment(1 << 20, 32, 255, 64) == 1


def test_no_entries(device: torch.device) -> None:
    dst = random_bytes(64, device, 1)
    before = dst.clone()
    side = side_of(dst, [[0]], 64, 64)
    none = units_of([], device)
    copy_pieces(side, side, src_units=none, dst_units=none)
    assert torch.equal(dst, before)


def test_one_compilation_serves_reads_of_all_lengths(tmp_path: Path) -> None:
    """A link that was prepared makes no read wait for a compiler."""
    printed = run_compiling("piece_compilations.py", tmp_path, timeout_s=120)
    assert printed.split() == ["_copy_pieces_kernel"]


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_two_gigabytes(device: torch.device) -> None:
    block = 1 << 20
    pool = torch.zeros(5 << 30, dtype=torch.uint8, device=device)
    out = torch.zeros(2 * block, dtype=torch.uint8, device=device)
    last = len(pool) // block - 1
    pool[-block:] = 7
    sides = side_of(pool, [[0]], block, block), side_of(out, [[0]], block, block)
    copy_pieces(*sides, src_units=units_of([last], device), dst_units=units_of([1], device))
    assert (out[block:] == 7).all() and not out[:block].any()


@pytest.mark.parametrize(
    ("offsets", "changes", "message"),
    [
        ([[0, 32]], {"piece_bytes": 33}, "pieces of bytes 0 to 65 leave their block of 64 bytes"),
        ([[-1]], {}, "pieces of bytes -1 to 15 leave their block"),
        ([[0]], {"piece_bytes": 0}, "1 pieces of 0 bytes"),
        ([[]], {}, "0 pieces of 16 bytes"),
        ([0], {}, r"offsets are \[1\] torch.int64"),
    ],
)
def test_sides_it_refuses(offsets: list[object], changes: dict[str, int], message: str) -> None:
    sizes = {"block_bytes": 64, "piece_bytes": 16} | changes
    with pytest.raises(ValueError, match=message):
        make_side(
            1 << 20, torch.tensor(offsets, dtype=torch.int64), device=torch.device("cpu"), **sizes
        )


def test_launches_it_refuses() -> None:
    cpu = torch.device("cpu")
    pool = random_bytes(256, cpu, 0)
    side = side_of(pool, [[0]], 64, 16)
    ids = units_of([0], cpu)
    with pytest.raises(ValueError, match="1 pieces of 16 bytes in src and 1 of 8 in dst"):
        copy_pieces(side, side_of(pool, [[0]], 64, 8), src_units=ids, dst_units=ids)
    with pytest.raises(ValueError, match="1 pieces of 16 bytes in src and 2 of 16 in dst"):
        copy_pieces(side, side_of(pool, [[0, 16]], 64, 16), src_units=ids, dst_units=ids)
    with pytest.raises(ValueError, match=r"src_units is \[1\] torch.int64"):
        copy_pieces(side, side, src_units=ids.long(), dst_units=ids)
    with pytest.raises(ValueError, match="1 source units for 0 target units"):
        copy_pieces(side, side, src_units=ids, dst_units=ids[:0])
    with pytest.raises(ValueError, match="max_programs is 0"):
        copy_pieces(side, side, src_units=ids, dst_units=ids, max_programs=0)
