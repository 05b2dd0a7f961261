"""Rates of reads of scattered blocks, by transport, block size, count and tensor-parallel pair.

Each case has one reading rank (rank 0) and the owning ranks it needs, in processes of their own. In
every round the transports and the machine's own limits take turns over the same blocks, so a rate
and its limit meet the same noise.
"""

from __future__ import annotations

import asyncio
import faulthandler
import secrets
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from baton.core.block import BlockId
from baton.core.worker_info import WorkerId
from bench.fabric.limits import RawSocket, memcpy_rate
from bench.fabric.owner import Owner
from bench.fabric.pool import NUM_KV_HEADS, PoolSpec, Side, open_side, random_bytes
from kvtransfer.plan import heads_of_rank, plan_sources

MEMCPY = "memcpy"
RAW_SOCKET = "raw socket"
READ_TIMEOUT_S = 30.0
CASE_TIMEOUT_S = 300.0
"""A library that never comes back may hold the interpreter's lock, so that no other limit is
noticed: then every thread's stack is printed and the process ends."""


@dataclass(frozen=True, slots=True)
class LinkCase:
    """One row of the table."""

    block_bytes: int
    """Of the whole model."""
    num_blocks: int
    """Read at once."""
    owner_tp: int = 1
    reader_tp: int = 1

    @property
    def label(self) -> str:
        size = f"{self.block_bytes >> 10} KiB" if self.block_bytes < 1 << 20 else (
            f"{self.block_bytes >> 20} MiB"
        )  # fmt: skip
        return f"{self.num_blocks:4d} x {size:>7}  tp {self.owner_tp}->{self.reader_tp}"


@dataclass(slots=True)
class LinkResult:
    """Bytes per second of every round, by contender."""

    case: LinkCase
    rates: dict[str, list[float]] = field(default_factory=dict)
    latency_s: dict[str, float] = field(default_factory=dict)
    """Of one block, by transport: what connecting has measured."""

    def add(self, contender: str, rate: float) -> None:
        self.rates.setdefault(contender, []).append(rate)

    def median(self, contender: str) -> float:
        return statistics.median(self.rates[contender])


@dataclass(slots=True)
class _Reader:
    kind: str
    side: Side
    sources: dict[WorkerId, tuple[Owner, range]]
    """Owning ranks as peers, and the heads to take from each."""


def measure_links(
    case: LinkCase, transports: Sequence[str], *, pool_bytes: int, rounds: int, seed: int
) -> LinkResult:
    """All contenders of one case, interleaved."""
    faulthandler.dump_traceback_later(CASE_TIMEOUT_S, exit=True)
    try:
        return _measure_links(case, transports, pool_bytes=pool_bytes, rounds=rounds, seed=seed)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _measure_links(
    case: LinkCase, transports: Sequence[str], *, pool_bytes: int, rounds: int, seed: int
) -> LinkResult:
    numbers = np.random.default_rng(seed)
    num_pool_blocks = max(case.num_blocks, pool_bytes // case.block_bytes)
    sources = plan_sources(case.owner_tp, 0, case.reader_tp, NUM_KV_HEADS)
    result = LinkResult(case)
    with ExitStack() as stack:
        owners = {}
        for rank in sources:
            spec = PoolSpec(case.block_bytes, num_pool_blocks, rank, case.owner_tp)
            owners[rank] = stack.enter_context(Owner(f"owner-{rank}", spec, seed + rank))
        raw = stack.enter_context(RawSocket())
        spec = PoolSpec(case.block_bytes, num_pool_blocks, 0, case.reader_tp)

        async def run() -> None:
            readers = [await _open_reader(kind, spec, owners, sources) for kind in transports]
            source, target = _random_pool(spec, seed), _random_pool(spec, seed + 1)
            for reader in readers:
                result.latency_s[reader.kind] = _latency_s(reader)
            for _ in range(rounds):
                there = numbers.choice(num_pool_blocks, case.num_blocks, replace=False).tolist()
                here = numbers.choice(num_pool_blocks, case.num_blocks, replace=False).tolist()
                for reader in numbers.permutation(len(readers)).tolist():
                    rate = await _rate(readers[reader], there, here, spec.rank_block_bytes)
                    result.add(readers[reader].kind, rate)
                result.add(MEMCPY, memcpy_rate(source, target, there, here))
                num_bytes = case.num_blocks * spec.rank_block_bytes
                result.add(RAW_SOCKET, raw.rate(target, num_bytes))
            for reader in readers:
                await reader.side.transport.close()

        asyncio.run(run())
    return result


async def _open_reader(
    kind: str, spec: PoolSpec, owners: dict[int, Owner], sources: dict[int, range]
) -> _Reader:
    reader = _Reader(kind, open_side(f"reader-{kind}", kind, spec, seed=0), {})
    for rank, owner in owners.items():
        nonce = secrets.token_bytes(16)
        name, _ = await reader.side.transport.connect(owner.card(nonce), nonce=nonce)
        reader.sources[name] = (owner, sources[rank])
    await _check(reader, spec)
    # A page that is read for the first time is mapped first: a pool in use has no such pages.
    everything = list(range(spec.num_blocks))
    await _read(reader, everything, everything)
    return reader


async def _rate(reader: _Reader, there: list[int], here: list[int], block_bytes: int) -> float:
    started_s = time.perf_counter()
    await _read(reader, there, here)
    return len(there) * block_bytes / (time.perf_counter() - started_s)


async def _read(reader: _Reader, there: list[int], here: list[int]) -> None:
    remote, local = [BlockId(b) for b in there], [BlockId(b) for b in here]
    await asyncio.gather(
        *(
            reader.side.transport.read(name, remote, local, timeout_s=READ_TIMEOUT_S)
            for name in reader.sources
        )
    )


async def _check(reader: _Reader, spec: PoolSpec) -> None:
    """A rate of wrong bytes is none: each head of a block must be what its owner wrote."""
    await _read(reader, [1], [2])
    mine = heads_of_rank(NUM_KV_HEADS, spec.tp_rank, spec.tp_size)
    found = reader.side.memory[2].reshape(len(mine), -1)
    for owner, heads in reader.sources.values():
        held = heads_of_rank(NUM_KV_HEADS, owner.spec.tp_rank, owner.spec.tp_size)
        written = random_bytes(2 * owner.spec.rank_block_bytes, owner.seed)
        block = written.reshape(2, len(held), -1)[1]
        for head in heads:
            if (found[head - mine.start] != block[head - held.start]).any():
                raise RuntimeError(f"{reader.kind} read head {head} of {owner.name} wrongly")


def _latency_s(reader: _Reader) -> float:
    reports = [reader.side.transport.link(name) for name in reader.sources]
    return max(report.latency_s for report in reports if report is not None)


def _random_pool(spec: PoolSpec, seed: int) -> NDArray[np.uint8]:
    size = spec.num_blocks * spec.rank_block_bytes
    return random_bytes(size, seed).reshape(-1, spec.rank_block_bytes).copy()
