"""Sums, columns and broadcasts between ranks, which are threads here with a group of their own."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from baton.core.errors import ConfigError
from baton.engine import communicator as communicator_module
from baton.engine.communicator import DistributedCommunicator, SingleCommunicator
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel.rendezvous import Rendezvous

CPU = torch.device("cpu")
T = TypeVar("T")


def on_ranks(size: int, folder: Path, work: Callable[[DistributedCommunicator], T]) -> list[T]:
    """`work` of each rank, at the same time."""

    def run(rank: int) -> T:
        communicator = DistributedCommunicator.connect(
            Parallel(rank, size), device=CPU, rendezvous=Rendezvous(folder / "ranks"), timeout_s=20
        )
        return work(communicator)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_the_same_bits_on_all_ranks(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(5, 33, generator=generator).to(dtype) for _ in range(size)]

    def work(communicator: DistributedCommunicator) -> torch.Tensor:
        with torch.inference_mode():
            x = parts[communicator.rank].clone()
            assert communicator.all_reduce_(x) is x
        return x

    sums = on_ranks(size, tmp_path, work)
    for x in sums[1:]:
        assert torch.equal(x, sums[0])
    expected = torch.stack([p.float() for p in parts]).sum(0)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    torch.testing.assert_close(sums[0].float(), expected, atol=rounding, rtol=rounding)


def test_columns_are_gathered_in_rank_order_on_rank_0(tmp_path: Path) -> None:
    def work(communicator: DistributedCommunicator) -> torch.Tensor | None:
        wide = torch.full((4, 6), float(communicator.rank))
        return communicator.gather_columns(wide[:, ::2])

    first, *others = on_ranks(3, tmp_path, work)
    assert first is not None
    assert first.tolist() == [[0.0] * 3 + [1.0] * 3 + [2.0] * 3] * 4
    assert others == [None, None]


def test_broadcast_smallest_and_barrier(tmp_path: Path) -> None:
    def work(communicator: DistributedCommunicator) -> tuple[list[int], int]:
        x = torch.arange(3) + 10 * communicator.rank
        communicator.broadcast_(x)
        communicator.barrier()
        return x.tolist(), communicator.smallest(7 - communicator.rank)

    assert on_ranks(2, tmp_path, work) == [([0, 1, 2], 6)] * 2


def test_faster_way_is_taken_for_what_it_can_do(tmp_path: Path) -> None:
    class Doubling:
        max_bytes = 16
        num_aborts = 0

        def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(100)

        def abort(self) -> None:
            self.num_aborts += 1

    def work(communicator: DistributedCommunicator) -> tuple[float, float, int]:
        small = Doubling()
        communicator.use_for_small(small)
        short, long = torch.ones(4), torch.ones(5)
        communicator.all_reduce_(short)
        communicator.all_reduce_(long)
        communicator.abort()
        return float(short[0]), float(long[0]), small.num_aborts

    assert on_ranks(2, tmp_path, work) == [(100.0, 2.0, 1)] * 2


def test_rank_that_does_not_come_is_not_waited_for_longer_than_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        DistributedCommunicator.connect(
            Parallel(0, 2), device=CPU, rendezvous=Rendezvous(tmp_path / "ranks"), timeout_s=0.5
        )


def test_interrupted_wait_for_a_rank_leaves_nothing_open(tmp_path: Path) -> None:
    rendezvous = Rendezvous(tmp_path / "ranks")
    threading.Timer(0.2, rendezvous.interrupt).start()
    start_s = time.monotonic()
    with pytest.raises(RuntimeError):
        DistributedCommunicator.connect(
            Parallel(0, 2), device=CPU, rendezvous=rendezvous, timeout_s=20
        )
    assert time.monotonic() - start_s < 3
    rendezvous.interrupt()
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not [link for link in links if link.resolve() == tmp_path / "ranks"]


def test_call_on_a_cpu_may_take_longer_than_opening_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(communicator_module, "CONNECT_TIMEOUT", timedelta(seconds=0.5))

    def work(communicator: DistributedCommunicator) -> None:
        if communicator.rank == 1:
            time.sleep(1.0)
        communicator.barrier()

    assert on_ranks(2, tmp_path, work) == [None, None]


def test_file_of_a_group_is_closed_after_its_last_use(tmp_path: Path) -> None:
    """Its store writes once more when it ends, by the number of the descriptor."""

    def open_here() -> int:
        num_open = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                link = os.readlink(f"/proc/self/fd/{name}")
                num_open += link.startswith(str(tmp_path / "ranks"))
        return num_open

    communicators = on_ranks(2, tmp_path, lambda communicator: communicator)
    assert open_here() == 2
    size_in_use = (tmp_path / "ranks").stat().st_size
    communicators.pop()
    assert open_here() == 1
    assert (tmp_path / "ranks").stat().st_size > size_in_use
    communicators.pop()
    assert open_here() == 0


def test_other_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tp_size 2 on device 'meta': take cuda"):
        DistributedCommunicator.connect(
            Parallel(0, 2),
            device=torch.device("meta"),
            rendezvous=Rendezvous(tmp_path / "ranks"),
            timeout_s=1,
        )


def test_single_rank_changes_nothing() -> None:
    single, x = SingleCommunicator(), torch.ones(2, 3)
    assert single.all_reduce_(x) is x
    assert single.gather_columns(x) is x
    assert single.broadcast_(x) is x
    assert (single.rank, single.size, single.smallest(3)) == (0, 1, 3)
    single.barrier()
    single.abort()


@pytest.mark.gpu
def test_nccl_calls_are_captured_in_a_graph(tmp_path: Path) -> None:
    """A group of one: that every call is enqueued on the capturing stream and none waits."""
    device = torch.device("cuda", 0)
    communicator = DistributedCommunicator.connect(
        Parallel(0, 1), device=device, rendezvous=Rendezvous(tmp_path / "ranks"), timeout_s=60
    )
    try:
        x, ids = torch.ones(8, 64, device=device), torch.arange(8, device=device)
        assert communicator.smallest(5) == 5

        def step() -> torch.Tensor:
            communicator.all_reduce_(x.add_(1.0))
            communicator.broadcast_(ids)
            communicator.barrier()
            gathered = communicator.gather_columns(x)
            assert gathered is not None
            return gathered

        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            gathered = step()
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize(device)
        assert torch.equal(gathered, torch.full((8, 64), 4.0, device=device))
    finally:
        torch.distributed.destroy_process_group()
