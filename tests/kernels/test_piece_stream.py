from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.piece_stream import MAX_STAGES, MIN_STAGED_UNITS, PieceStream


def stream_of(device: torch.device) -> PieceStream:
    return PieceStream(device.index or 0 if device.type == "cuda" else None)


def test_copies_are_done_and_seen_by_what_comes_after(device: torch.device) -> None:
    src = torch.arange(8 * 64, dtype=torch.int32, device=device).view(8, 64)
    dst = torch.zeros(8, 64, dtype=torch.int32, device=device)
    stream = stream_of(device)
    offsets = np.zeros((1, 1), dtype=np.int64)
    sides = [
        stream.side(pool.data_ptr(), offsets, block_bytes=256, piece_bytes=256)
        for pool in (src, dst)
    ]
    pieces = stream.prepare(*sides)
    assert not dst.any()
    launches = [
        stream.start(
            pieces, np.array([i, i + 1], dtype=np.int32), np.array([i + 1, i], dtype=np.int32)
        )
        for i in (0, 2, 4, 6)
    ]
    assert all(launch.wait(30.0) for launch in launches)
    assert all(launch.is_done() for launch in launches)
    assert torch.equal(dst, src[[1, 0, 3, 2, 5, 4, 7, 6]])


def test_a_side_that_leaves_its_blocks_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="leave their block"):
        stream_of(device).side(
            1 << 20, np.array([[200]], dtype=np.int64), block_bytes=256, piece_bytes=64
        )


@pytest.mark.gpu
def test_a_launch_waits_for_nothing(device: torch.device) -> None:
    """Behind a long kernel on another stream a copy still starts and ends."""
    src = torch.ones(4, 64, dtype=torch.int32, device=device)
    dst = torch.zeros_like(src)
    stream = stream_of(device)
    offsets = np.zeros((1, 1), dtype=np.int64)
    sides = [
        stream.side(pool.data_ptr(), offsets, block_bytes=256, piece_bytes=256)
        for pool in (src, dst)
    ]
    pieces = stream.prepare(*sides)
    ids = np.arange(4, dtype=np.int32)
    busy = torch.cuda.Stream(device)
    with torch.cuda.stream(busy):
        torch.cuda._sleep(2_000_000_000)
    assert stream.start(pieces, ids, ids).wait(0.5)
    assert not busy.query()
    busy.synchronize()


def test_lists_of_launches_under_way_are_left_alone(device: torch.device) -> None:
    """More launches than there are places for lists, of lists longer than any place at first."""
    num_units = MIN_STAGED_UNITS + 1
    src = torch.arange(num_units * 4, dtype=torch.int32, device=device).view(num_units, 4)
    dst = torch.zeros_like(src)
    stream = stream_of(device)
    offsets = np.zeros((1, 1), dtype=np.int64)
    sides = [
        stream.side(pool.data_ptr(), offsets, block_bytes=16, piece_bytes=16) for pool in (src, dst)
    ]
    pieces = stream.prepare(*sides)
    ids = np.random.default_rng(1).permutation(num_units).astype(np.int32)
    parts = [ids[number :: MAX_STAGES + 4] for number in range(MAX_STAGES + 4)]
    launches = [stream.start(pieces, part, part) for part in parts[:-1]]
    assert all(launch.wait(30.0) for launch in launches)
    missing = torch.from_numpy(parts[-1].astype(np.int64)).to(device)
    assert not dst[missing].any()
    assert stream.start(pieces, ids, ids).wait(30.0)
    assert torch.equal(dst, src)
