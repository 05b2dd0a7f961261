"""The copying kernel by itself over a mapped pool: every tile and number of programs, launches of
several sizes, and what a copy takes from work on the two GPUs.

Rates are of the GPU's own time (events), so neither the mover nor the event loop is in them. The
limit is the driver's copy of the same size, since short copies reach less of the link's rate.
"""

from __future__ import annotations

import secrets
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.fabric.gpu_links import Bench, GpuLinkCase, units_of
from bench.fabric.gpu_owner import multiply_rate
from bench.fabric.gpu_pool import check_arrived
from bench.fabric.pool import SECRET
from kernels.piece_copy import (
    MAX_PROGRAMS,
    TILE,
    CopyTile,
    PieceSide,
    candidate_tiles,
    copy_pieces,
    make_side,
)
from kvtransfer.group_card import open_cards
from kvtransfer.mapped_memory import CudaMapper
from kvtransfer.metadata import MappedEndpoint
from kvtransfer.plan import plan_pair

PROGRAMS = (16, 30, 66, 132, 264)
SWEPT_BYTES = 256 << 20
LAUNCHES = 4
"""Back to back, as the pieces of a large read are."""
SWEPT_CASES = (
    GpuLinkCase(256 << 10, SWEPT_BYTES),
    GpuLinkCase(2 << 20, SWEPT_BYTES),
    GpuLinkCase(2 << 20, SWEPT_BYTES, owner_block_size=64),
)
SIZED_BLOCK_BYTES = (256 << 10, 2 << 20, 8 << 20)
LAUNCH_BYTES = (64 << 20, 256 << 20, 1 << 30)
COPIED_CASE = GpuLinkCase(2 << 20, SWEPT_BYTES)
"""Beside other work, over and over."""
WORK_S = 0.35
COPY_S = 0.5
"""Begins before the work beside it and ends after."""
COPIES_AHEAD = 3
STREAMED_BYTES = 2 << 30
DRIVER = "driver"


@dataclass(slots=True)
class Swept:
    """Bytes per second of one way to divide a copy."""

    case: str
    tile: CopyTile
    max_programs: int
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def is_default(self) -> bool:
        return (self.tile, self.max_programs) == (TILE, MAX_PROGRAMS)


@dataclass(frozen=True, slots=True)
class Sides:
    """A case's pools as the kernel takes them."""

    bench: Bench
    case: GpuLinkCase
    remote: PieceSide
    local: PieceSide

    def units(self, numbers: np.random.Generator, count: int | None = None) -> tuple[Tensor, ...]:
        """Scattered ones, on the reader's GPU."""
        found = units_of(self.bench, self.case, numbers, count)
        return tuple(torch.from_numpy(part).to(self.bench.arena.device) for part in found)

    def copy(
        self, units: tuple[Tensor, ...], max_programs: int = MAX_PROGRAMS, tile: CopyTile = TILE
    ) -> None:
        copy_pieces(
            self.remote,
            self.local,
            src_units=units[0],
            dst_units=units[1],
            max_programs=max_programs,
            tile=tile,
        )


@contextmanager
def mapped_sides(bench: Bench, case: GpuLinkCase) -> Iterator[Sides]:
    """The owner's pool as mapped here, and the reader's own; the reader's GPU is the current one
    inside."""
    nonce = secrets.token_bytes(16)
    wire = bench.owner.open(case.pools(bench.arena_bytes, is_owner=True), bench.kind, nonce)
    (card,) = open_cards(wire, SECRET, now_s=time.time(), nonce=nonce)
    endpoint = card.endpoint(MappedEndpoint)
    assert endpoint is not None
    (local,) = case.pools(bench.arena_bytes, is_owner=False).ranks
    plan = plan_pair(card.pool, local)
    assert plan is not None
    device = bench.arena.device
    mapping = CudaMapper(device.index or 0).open(endpoint, card.pool.num_bytes)
    remote, here = (
        make_side(
            address,
            torch.from_numpy(side.offsets),
            block_bytes=side.block_bytes,
            piece_bytes=side.piece_bytes,
            device=device,
        )
        for address, side in (
            (mapping.address, plan.remote),
            (bench.arena.data_ptr(), plan.local),
        )
    )
    try:
        with torch.cuda.device(device):
            yield Sides(bench, case, remote, here)
    finally:
        torch.cuda.synchronize(device)
        mapping.close()


def sweep(bench: Bench, case: GpuLinkCase, *, rounds: int, seed: int) -> list[Swept]:
    """Every candidate checked once, then all timed in turns; the best first."""
    numbers = np.random.default_rng(seed)
    tiles = candidate_tiles()
    variants = [Swept(case.label, tile, programs) for tile in tiles for programs in PROGRAMS]
    with mapped_sides(bench, case) as sides:
        for tile in tiles:
            _check(sides, numbers, tile)
        for _ in range(rounds):
            units = sides.units(numbers)
            for variant in variants:
                seconds = _launched_s(sides, units, variant)
                variant.rates.append(LAUNCHES * case.num_units * case.block_bytes / seconds)
    return sorted(variants, key=lambda v: -v.rate)


def _check(sides: Sides, numbers: np.random.Generator, tile: CopyTile) -> None:
    bench, case = sides.bench, sides.case
    units = units_of(bench, case, numbers)
    bench.arena.zero_()
    sides.copy(tuple(torch.from_numpy(part).to(bench.arena.device) for part in units), tile=tile)
    owner, reader = (case.pools(bench.arena_bytes, is_owner=side) for side in (True, False))
    check_arrived(owner, reader, bench.arena, units, seed=bench.seed)


def _launched_s(sides: Sides, units: tuple[Tensor, ...], variant: Swept) -> float:
    def launch_all() -> None:
        for _ in range(LAUNCHES):
            sides.copy(units, variant.max_programs, variant.tile)

    return _event_seconds(launch_all)


def measure_launches(bench: Bench, *, rounds: int, seed: int) -> list[dict[str, Any]]:
    """One launch of each size beside one copy by the driver of as many bytes, in turns."""
    numbers = np.random.default_rng(seed)
    rows = []
    for block_bytes in SIZED_BLOCK_BYTES:
        with mapped_sides(bench, GpuLinkCase(block_bytes, max(LAUNCH_BYTES))) as sides:
            for num_bytes in LAUNCH_BYTES:
                kernel, driver = [], []
                for _ in range(rounds):
                    units = sides.units(numbers, num_bytes // block_bytes)
                    kernel.append(num_bytes / _event_seconds(partial(sides.copy, units)))
                    driver.append(num_bytes / _event_seconds(partial(bench.peak.copy, num_bytes)))
                rows.append(
                    {
                        "block_bytes": block_bytes,
                        "launch_bytes": num_bytes,
                        "kernel": kernel,
                        "driver": driver,
                    }
                )
    return rows


def measure_interference(bench: Bench, *, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Rates of work on either GPU, alone and beside copies of several widths, and of the copies."""
    works: dict[str, Callable[[], float]] = {
        "owner's matmul": lambda: _multiplied(bench),
        "reader's matmul": lambda: _on_own_stream(bench, multiply_rate),
        "reader's memory": lambda: _on_own_stream(bench, _stream_rate),
    }
    rows = []
    with mapped_sides(bench, COPIED_CASE) as sides:
        units = sides.units(np.random.default_rng(seed))
        copies: dict[int | str, Callable[[], None]] = {
            programs: partial(sides.copy, units, programs) for programs in PROGRAMS
        }
        copies[DRIVER] = partial(bench.peak.copy, SWEPT_BYTES)
        for name, work in works.items():
            alone: list[float] = []
            beside: dict[int | str, list[tuple[float, float]]] = {}
            for _ in range(rounds):
                alone.append(work())
                for width, copy in copies.items():
                    beside.setdefault(width, []).append(_beside(bench, copy, work))
            rows.append({"work": name, "alone": alone, "beside": beside})
    return rows


def _beside(
    bench: Bench, copy: Callable[[], None], work: Callable[[], float]
) -> tuple[float, float]:
    """What `work` says, and bytes per second of the copies that run all the while."""
    copied: list[float] = []
    thread = threading.Thread(target=lambda: copied.append(_copy_rate(bench, copy)))
    thread.start()
    time.sleep((COPY_S - WORK_S) / 3)
    rate = work()
    thread.join()
    return rate, copied[0]


def _copy_rate(bench: Bench, copy: Callable[[], None]) -> float:
    device = bench.arena.device
    ahead: deque[torch.cuda.Event] = deque()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        started_s = time.perf_counter()
        count = 0
        while time.perf_counter() - started_s < COPY_S:
            copy()
            event = torch.cuda.Event()
            event.record()
            ahead.append(event)
            count += 1
            if len(ahead) > COPIES_AHEAD:
                ahead.popleft().synchronize()
        torch.cuda.current_stream().synchronize()
        return count * SWEPT_BYTES / (time.perf_counter() - started_s)


def _multiplied(bench: Bench) -> float:
    bench.owner.start_multiplying(WORK_S)
    return bench.owner.multiplied()


def _on_own_stream(bench: Bench, work: Callable[[float], float]) -> float:
    device = bench.arena.device
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        return work(WORK_S)


def _stream_rate(seconds: float) -> float:
    """Bytes per second of reading memory far larger than the caches, as decode steps do."""
    data = torch.ones(STREAMED_BYTES // 4, device="cuda")
    stream = torch.cuda.current_stream()
    data.sum()
    stream.synchronize()
    started_s = time.perf_counter()
    count = 0
    while (elapsed_s := time.perf_counter() - started_s) < seconds:
        for _ in range(8):
            data.sum()
        stream.synchronize()
        count += 8
    return count * STREAMED_BYTES / elapsed_s


def _event_seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
