"""Reads between two GPUs as `bench.transfer` times them, over files that stand for their memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from baton.core.worker_info import WorkerId
from bench.fabric import gpu_links, gpu_pool
from bench.fabric.gpu_links import Bench, GpuLinkCase, measure_cases, units_of
from kernels.piece_stream import PieceStream
from kvtransfer.block_read import MoverLimits
from kvtransfer.group_card import join_cards
from kvtransfer.mapped_link import MappedLink
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.shm_transport import ShmPool
from mapped_files import FileMapper
from triton_interpreter import complete_interpreter

ARENA_BYTES = 2 << 20
SEED = 5
CASES = [
    GpuLinkCase(32 << 10, 128 << 10),
    GpuLinkCase(32 << 10, 128 << 10, owner_tp=2),
    GpuLinkCase(32 << 10, 128 << 10, reader_block_size=64),
]


class Peak:
    def rate(self) -> float:
        return 1e9


class Owner:
    """In the place of the other process."""

    def __init__(self, arena: torch.Tensor, open_transports: Any) -> None:
        self._arena = arena
        self._open_transports = open_transports

    def open(self, pools: Any, kind: str, nonce: bytes) -> bytes:
        self.opened = self._open_transports(gpu_links.NAME, pools, self._arena, kind=kind)
        return join_cards([transport.card(nonce) for transport in self.opened])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    complete_interpreter(monkeypatch)
    pools: dict[int, ShmPool] = {}

    def arena(seed: int | None) -> torch.Tensor:
        pool = ShmPool.create(ARENA_BYTES)
        tensor = torch.frombuffer(pool.memory, dtype=torch.int32)
        tensor.copy_(gpu_pool.make_arena(ARENA_BYTES, tensor.device, seed=seed))
        pools[tensor.data_ptr()] = pool
        return tensor

    def open_transports(
        name: str, shape: gpu_pool.WorkerPools, memory: torch.Tensor, *, kind: str
    ) -> list[MoverTransport]:
        made = []
        for pool, start in zip(shape.ranks, shape.starts, strict=True):
            region = gpu_pool.region_of(pool, memory, start)
            mapper = FileMapper(pools[memory.data_ptr()])
            made.append(
                MoverTransport(
                    links=[MappedLink(region, mapper, lambda: PieceStream(None))],
                    region=region,
                    identity=PeerIdentity(WorkerId(name), gpu_pool.EPOCH),
                    secret=gpu_pool.SECRET,
                    limits=MoverLimits(max_piece_bytes=1 << 30, max_bytes_in_flight=1 << 30),
                )
            )
        return made

    monkeypatch.setattr(gpu_links, "open_rank_transports", open_transports)
    monkeypatch.setattr(gpu_links, "LATENCY_READS", 1)
    owner = Owner(arena(SEED), open_transports)
    yield Bench(owner, arena(None), Peak(), SEED)  # type: ignore[arg-type]
    for pool in pools.values():
        pool.close()


def test_all_kinds_of_pairs_are_read_rightly_and_timed(bench: Bench) -> None:
    results = list(measure_cases(bench, CASES, rounds=1, seed=1, until_s=time.monotonic() + 60))
    assert [result.case for result in results] == CASES
    assert all(len(result.read) == 1 and result.share > 0 for result in results)


def test_no_case_is_started_after_its_time(bench: Bench) -> None:
    assert not list(measure_cases(bench, CASES, rounds=1, seed=1, until_s=0.0))


@pytest.mark.parametrize("case", CASES)
def test_bytes_that_did_not_arrive_are_found(case: GpuLinkCase) -> None:
    arena = gpu_pool.make_arena(ARENA_BYTES, torch.device("cpu"), seed=None)
    bench = Bench(None, arena, None, SEED)  # type: ignore[arg-type]
    owner, reader = (case.pools(ARENA_BYTES, is_owner=side) for side in (True, False))
    units = units_of(bench, case, np.random.default_rng(2))
    with pytest.raises(RuntimeError, match="holds wrong bytes"):
        gpu_pool.check_arrived(owner, reader, arena, units, seed=SEED)
