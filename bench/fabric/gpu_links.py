"""Rates of reads from one GPU to another, beside the copy that the link itself allows.

The reader is this process, the owner another; every rank of either lies on its side's GPU, so all
cases share one link. In every round the read and a plain copy of one long piece between the two
GPUs take turns.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from baton.core.block import BlockId
from baton.core.worker_info import WorkerId
from bench.fabric.gpu_owner import NAME, GpuOwner
from bench.fabric.gpu_pool import (
    NUM_SCRATCH_BLOCKS,
    WorkerPools,
    check_arrived,
    join,
    open_rank_transports,
)
from bench.fabric.pool import LAYER_BYTES, NUM_KV_HEADS
from kvtransfer.group_transport import GroupTransport
from kvtransfer.plan import BlockIds

OWNER = WorkerId(NAME)
READ_TIMEOUT_S = 10.0
BLOCK_TOKENS = 16
LATENCY_READS = 50


@dataclass(frozen=True, slots=True)
class GpuLinkCase:
    """One row of the table."""

    block_bytes: int
    """Of the whole model, 16 tokens."""
    batch_bytes: int
    """Read at once, by all ranks together."""
    owner_tp: int = 1
    reader_tp: int = 1
    owner_block_size: int = BLOCK_TOKENS
    """Tokens; a block is longer by as much."""
    reader_block_size: int = BLOCK_TOKENS

    @property
    def label(self) -> str:
        sizes = "" if self.owner_block_size == self.reader_block_size else (
            f", blocks of {self.owner_block_size}->{self.reader_block_size} tokens"
        )  # fmt: skip
        return (
            f"{self.num_units:6d} x {_size(self.block_bytes):>8}  "
            f"tp {self.owner_tp}->{self.reader_tp}{sizes}"
        )

    @property
    def num_units(self) -> int:
        return max(1, self.batch_bytes // self.block_bytes)

    def pools(self, arena_bytes: int, *, is_owner: bool) -> WorkerPools:
        """As many blocks as the arena holds."""
        block_size = self.owner_block_size if is_owner else self.reader_block_size
        tp_size = self.owner_tp if is_owner else self.reader_tp
        # All heads once, whatever the number of ranks.
        held_bytes = self.block_bytes * block_size // BLOCK_TOKENS * max(1, tp_size // NUM_KV_HEADS)
        return WorkerPools(
            self.block_bytes // LAYER_BYTES, arena_bytes // held_bytes, block_size, tp_size
        )


@dataclass(slots=True)
class GpuLinkResult:
    """Bytes per second of every round."""

    case: GpuLinkCase
    read: list[float] = field(default_factory=list)
    """As the caller on the event loop sees it."""
    moved: list[float] = field(default_factory=list)
    """From the first launch to the look that found the last one ended. Too much where a rank reads
    from several: each part counts its own time alone."""
    peak: list[float] = field(default_factory=list)
    connect_s: float = 0.0
    """Cards, mapping, compiling and timing."""
    latency_s: float = 0.0
    """Of one block, median."""

    @property
    def share(self) -> float:
        return statistics.median(self.read) / statistics.median(self.peak)


class PeerCopy:
    """What the link allows: one long copy by the driver from the owner's GPU to the reader's."""

    def __init__(self, num_bytes: int, owner_device: torch.device, device: torch.device) -> None:
        self._source = torch.empty(num_bytes // 4, dtype=torch.int32, device=owner_device)
        self._source.random_()
        self._target = torch.empty_like(self._source, device=device)
        self._devices = (owner_device, device)
        self._num_bytes = num_bytes
        self.rate(1)

    def rate(self, count: int = 4) -> float:
        """Bytes per second."""
        self._synchronize()
        started_s = time.perf_counter()
        for _ in range(count):
            self.copy(self._num_bytes)
        self._synchronize()
        seconds = time.perf_counter() - started_s
        return count * self._num_bytes / seconds

    def copy(self, num_bytes: int) -> None:
        """Start to copy that much."""
        count = num_bytes // self._source.element_size()
        self._target[:count].copy_(self._source[:count], non_blocking=True)

    def _synchronize(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Bench:
    """The two sides, made once for all cases."""

    owner: GpuOwner
    arena: Tensor
    """The reader's; the owner's is as long."""
    peak: PeerCopy
    seed: int
    """Of the owner's content."""
    kind: str = "mapped"

    @property
    def arena_bytes(self) -> int:
        return self.arena.numel() * self.arena.element_size()

    async def connect(self, case: GpuLinkCase) -> GroupTransport:
        pools = case.pools(self.arena_bytes, is_owner=False)
        transport = join(
            open_rank_transports("reader", pools, self.arena, kind=self.kind), pools, self.arena
        )
        nonce = secrets.token_bytes(16)
        owner_pools = case.pools(self.arena_bytes, is_owner=True)
        await transport.connect(self.owner.open(owner_pools, self.kind, nonce), nonce=nonce)
        return transport


async def measure_case(bench: Bench, case: GpuLinkCase, *, rounds: int, seed: int) -> GpuLinkResult:
    """Checked once, then timed."""
    numbers = np.random.default_rng(seed)
    result = GpuLinkResult(case)
    started_s = time.perf_counter()
    transport = await bench.connect(case)
    result.connect_s = time.perf_counter() - started_s
    try:
        await _check(bench, case, transport, numbers)
        result.latency_s = await _latency_s(transport, case, bench, numbers)
        for _ in range(rounds):
            remote, local = _as_ids(units_of(bench, case, numbers))
            started_s = time.perf_counter()
            stats = await transport.read(OWNER, remote, local, timeout_s=READ_TIMEOUT_S)
            result.read.append(stats.num_bytes / (time.perf_counter() - started_s))
            result.moved.append(stats.num_bytes / stats.seconds)
            result.peak.append(bench.peak.rate())
    finally:
        await transport.close()
    return result


def units_of(
    bench: Bench, case: GpuLinkCase, numbers: np.random.Generator, count: int | None = None
) -> tuple[BlockIds, BlockIds]:
    """Scattered units of the owner, and of the reader."""
    count = case.num_units if count is None else count
    unit_tokens = min(case.owner_block_size, case.reader_block_size)
    found = []
    for is_owner in (True, False):
        pools = case.pools(bench.arena_bytes, is_owner=is_owner)
        num_units = (pools.num_blocks - NUM_SCRATCH_BLOCKS) * (pools.block_size // unit_tokens)
        found.append(numbers.choice(num_units, count, replace=False).astype(np.int32))
    return found[0], found[1]


def _as_ids(units: tuple[BlockIds, BlockIds]) -> tuple[list[BlockId], list[BlockId]]:
    remote, local = (array.tolist() for array in units)
    return remote, local


async def _check(
    bench: Bench, case: GpuLinkCase, transport: GroupTransport, numbers: np.random.Generator
) -> None:
    units = units_of(bench, case, numbers)
    bench.arena.zero_()
    if bench.arena.is_cuda:
        torch.cuda.synchronize(bench.arena.device)
    await transport.read(OWNER, *_as_ids(units), timeout_s=READ_TIMEOUT_S)
    owner, reader = (case.pools(bench.arena_bytes, is_owner=side) for side in (True, False))
    check_arrived(owner, reader, bench.arena, units, seed=bench.seed)


async def _latency_s(
    transport: GroupTransport, case: GpuLinkCase, bench: Bench, numbers: np.random.Generator
) -> float:
    seconds = []
    for _ in range(LATENCY_READS):
        remote, local = _as_ids(units_of(bench, case, numbers, 1))
        started_s = time.perf_counter()
        await transport.read(OWNER, remote, local, timeout_s=READ_TIMEOUT_S)
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def measure_cases(
    bench: Bench, cases: Iterable[GpuLinkCase], *, rounds: int, seed: int, until_s: float
) -> Iterable[GpuLinkResult]:
    """Results as they come; ends at `until_s` (monotonic) with what there is."""
    for number, case in enumerate(cases):
        if time.monotonic() > until_s:
            return
        yield asyncio.run(measure_case(bench, case, rounds=rounds, seed=seed + number))


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
