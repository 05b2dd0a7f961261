from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.one_shot_all_reduce import (
    DEFAULT_MAX_BYTES,
    MAX_PROGRAMS,
    Peers,
    Phase,
    _tile,
    buffer_bytes,
    make_peers,
    one_shot_all_reduce,
    one_shot_all_reduce_reference,
)
from kernels.one_shot_group import OneShotAllReduce

ROOT = Path(__file__).parents[2]
# The sum is exact in the order given up to its one rounding, which the interpreter truncates.
RTOL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 0.0}
DTYPES = list(RTOL)
SHORT_S = 1e-5
"""Ten polls."""


def make_group(
    world_size: int, device: torch.device, max_bytes: int = DEFAULT_MAX_BYTES
) -> list[Peers]:
    """All ranks of a group in one process, on one device."""
    num_bytes = buffer_bytes(max_bytes, world_size)
    buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(world_size)]
    addresses = tuple(buffer.data_ptr() for buffer in buffers)
    return [
        make_peers(buffers[rank], addresses, rank=rank, max_bytes=max_bytes)
        for rank in range(world_size)
    ]


def make_parts(
    world_size: int, size: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(world_size, size, generator=generator).to(device, dtype).unbind())


def sum_in_turn(
    group: list[Peers], parts: list[Tensor], residuals: list[Tensor] | None = None
) -> list[Tensor]:
    """One rank after another: all publish, then all reduce."""
    for peers, x in zip(group, parts, strict=True):
        one_shot_all_reduce(x, peers, phases=Phase.PUBLISH)
    return [
        one_shot_all_reduce(
            parts[peers.rank],
            peers,
            residual=residuals[peers.rank] if residuals else None,
            deadline_s=SHORT_S,
            phases=Phase.REDUCE,
        )
        for peers in group
    ]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=RTOL[expected.dtype], atol=0)


def assert_well(group: list[Peers], num_calls: int) -> None:
    for peers in group:
        assert peers.failed_rank.tolist() == [-1]
        assert peers.epoch.tolist() == [num_calls]
        assert peers.state.tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1000, 4096])
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_get_the_same_sum(
    world_size: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    group = make_group(world_size, device)
    parts = make_parts(world_size, size, dtype, device)
    outs = sum_in_turn(group, parts)
    assert_close(outs[0], one_shot_all_reduce_reference(parts))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert_well(group, 1)


@pytest.mark.parametrize("world_size", [3, 8, 16])
def test_group_sizes(world_size: int, device: torch.device) -> None:
    group = make_group(world_size, device)
    parts = make_parts(world_size, 1500, torch.float32, device)
    for out in sum_in_turn(group, parts):
        assert_close(out, one_shot_all_reduce_reference(parts))


def test_residual_is_added_before_rounding(device: torch.device) -> None:
    """256 + 0.5 + 0.5 is 257 in one rounding, and 256 in two."""
    group = make_group(2, device)
    parts = [torch.full((8,), 0.5, dtype=torch.float16, device=device) for _ in range(2)]
    parts = [part / 1024 for part in parts]
    residuals = [torch.ones(8, dtype=torch.float16, device=device) * r for r in (1, 2)]
    outs = sum_in_turn(group, parts, residuals)
    assert outs[0].tolist() == [1 + 2**-10] * 8
    assert outs[1].tolist() == [2.0] * 8


def test_out_may_be_the_residual_or_the_input(device: torch.device) -> None:
    group = make_group(2, device)
    parts = make_parts(2, 100, torch.float32, device)
    residual = torch.ones(100, device=device)
    total = one_shot_all_reduce_reference(parts)
    for peers in group:
        one_shot_all_reduce(parts[peers.rank], peers, phases=Phase.PUBLISH)
    one_shot_all_reduce(parts[0], group[0], residual=residual, out=residual, phases=Phase.REDUCE)
    one_shot_all_reduce(parts[1], group[1], out=parts[1], phases=Phase.REDUCE)
    assert_close(residual, total + 1)
    assert_close(parts[1], total)


def test_calls_of_changing_sizes_and_dtypes_share_the_buffers(device: torch.device) -> None:
    group = make_group(2, device)
    calls = [(3000, 0), (1, 1), (3000, 2), (5, 0), (1025, 1), (2048, 2), (3000, 0)]
    for call, (size, dtype) in enumerate(calls):
        parts = make_parts(2, size, DTYPES[dtype], device, seed=call)
        for out in sum_in_turn(group, parts):
            assert_close(out, one_shot_all_reduce_reference(parts))
    assert_well(group, len(calls))


def test_a_rank_one_call_ahead_does_not_disturb_the_others(device: torch.device) -> None:
    """Rank 0 publishes its next message before rank 1 has reduced the last."""
    group = make_group(2, device)
    first = make_parts(2, 50, torch.float32, device, seed=1)
    second = make_parts(2, 50, torch.float32, device, seed=2)
    for peers in group:
        one_shot_all_reduce(first[peers.rank], peers, phases=Phase.PUBLISH)
    one_shot_all_reduce(first[0], group[0], phases=Phase.REDUCE)
    one_shot_all_reduce(second[0], group[0], phases=Phase.PUBLISH)
    late = one_shot_all_reduce(first[1], group[1], deadline_s=SHORT_S, phases=Phase.REDUCE)
    assert_close(late, one_shot_all_reduce_reference(first))


@pytest.mark.gpu
def test_largest_message(device: torch.device) -> None:
    group = make_group(2, device)
    parts = make_parts(2, DEFAULT_MAX_BYTES // 2, torch.bfloat16, device)
    for out in sum_in_turn(group, parts):
        assert_close(out, one_shot_all_reduce_reference(parts))


@pytest.mark.parametrize("num_bytes", [2, 2048, 2050, 262144, 262146, 524288, 1 << 20, 1 << 24])
def test_every_message_has_enough_signals(num_bytes: int) -> None:
    tile = _tile(num_bytes, itemsize=2)
    num_programs = -(-num_bytes // (2 * tile.elements))
    assert num_programs <= MAX_PROGRAMS
    assert tile.elements * 2 % (tile.num_warps * 32 * 16) == 0


@pytest.mark.gpu
def test_messages_beyond_the_programs_signals_take_larger_tiles(device: torch.device) -> None:
    max_bytes = 8192 * MAX_PROGRAMS
    group = make_group(2, device, max_bytes)
    parts = make_parts(2, max_bytes // 4, torch.float32, device)
    assert_close(sum_in_turn(group, parts)[1], one_shot_all_reduce_reference(parts))


def test_a_missing_rank_is_named_and_the_result_is_not_a_number(device: torch.device) -> None:
    group = make_group(3, device)
    parts = make_parts(3, 3000, torch.float32, device)
    for rank in (0, 2):
        one_shot_all_reduce(parts[rank], group[rank], phases=Phase.PUBLISH)
    all_reduce = OneShotAllReduce(group[0], deadline_s=SHORT_S)
    out = one_shot_all_reduce(parts[0], group[0], deadline_s=SHORT_S, phases=Phase.REDUCE)
    assert bool(out.isnan().all())
    assert all_reduce.failed_rank.tolist() == [1]
    with pytest.raises(TimeoutError, match="rank 1 of 3"):
        all_reduce.raise_if_failed()


def test_a_group_that_failed_stays_failed(device: torch.device) -> None:
    """Also when the lost rank comes back: its calls no longer match ours."""
    group = make_group(2, device)
    parts = make_parts(2, 100, torch.float32, device)
    one_shot_all_reduce(parts[0], group[0], phases=Phase.PUBLISH)
    one_shot_all_reduce(parts[0], group[0], deadline_s=SHORT_S, phases=Phase.REDUCE)
    one_shot_all_reduce(parts[1], group[1], phases=Phase.PUBLISH)
    one_shot_all_reduce(parts[0], group[0], phases=Phase.PUBLISH)
    out = one_shot_all_reduce(parts[0], group[0], deadline_s=1e6, phases=Phase.REDUCE)
    assert bool(out.isnan().all())
    assert group[0].failed_rank.tolist() == [1]


def test_an_empty_message_is_no_call(device: torch.device) -> None:
    group = make_group(2, device)
    assert one_shot_all_reduce(torch.empty(0, device=device), group[0]).shape == (0,)
    assert_well(group, 0)


def test_in_place_sum(device: torch.device) -> None:
    group = make_group(2, device, max_bytes=1024)
    parts = make_parts(2, 100, torch.float32, device)
    one_shot_all_reduce(parts[1], group[1], phases=Phase.PUBLISH)
    total = one_shot_all_reduce_reference(parts)
    all_reduce = OneShotAllReduce(group[0], deadline_s=SHORT_S)
    assert all_reduce.max_bytes == 1024
    assert all_reduce.all_reduce_(parts[0]) is parts[0]
    assert_close(parts[0], total)
    all_reduce.raise_if_failed()


def test_an_aborted_group_waits_for_nobody(device: torch.device) -> None:
    group = make_group(2, device)
    all_reduce = OneShotAllReduce(group[0], deadline_s=1e6)
    all_reduce.abort()
    if device.type == "cuda":
        torch.cuda.synchronize()
    for _ in range(2):
        assert bool(all_reduce(torch.zeros(3000, device=device)).isnan().all())
    with pytest.raises(TimeoutError, match="aborted"):
        all_reduce.raise_if_failed()


@pytest.mark.gpu
def test_an_abort_ends_a_running_call(device: torch.device) -> None:
    """The peer never comes, and the deadline is far longer than the test may take."""
    x = torch.zeros(64 * 4096, dtype=torch.bfloat16, device=device)
    one_shot_all_reduce(x, make_group(2, device)[0], deadline_s=SHORT_S)
    all_reduce = OneShotAllReduce(make_group(2, device)[0], deadline_s=100.0)
    torch.cuda.synchronize()
    out = all_reduce(x)
    done = torch.cuda.Event()
    done.record()
    time.sleep(0.2)
    assert not done.query()
    all_reduce.abort()
    started_s = time.monotonic()
    done.synchronize()
    assert time.monotonic() - started_s < 5
    assert bool(out.isnan().all())


def start_ranks(calls: list[int], folder: Path) -> list[subprocess.Popen[str]]:
    script = Path(__file__).with_name("one_shot_all_reduce_rank.py")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(len(calls)), str(folder), str(num_calls)],
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, num_calls in enumerate(calls)
    ]


def run_ranks(calls: list[int], folder: Path) -> list[tuple[int, str]]:
    processes = start_ranks(calls, folder)
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs' own tests cover it")
def test_processes_at_once_until_one_stops(tmp_path: Path) -> None:
    """Sixteen right sums in each, then the process that goes on names the one that does not."""
    (code_0, output_0), (code_1, output_1) = run_ranks([17, 16], tmp_path)
    assert code_1 == 0, output_1
    assert code_0 == 3, output_0
    assert "rank 1 of 2" in output_0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_gpus_at_once(world_size: int, tmp_path: Path) -> None:
    if world_size > torch.cuda.device_count():
        pytest.skip(f"needs {world_size} GPUs")
    for code, output in run_ranks([500] * world_size, tmp_path):
        assert code == 0, output


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_stops_is_named_by_the_others(tmp_path: Path) -> None:
    (code_0, output_0), (code_1, output_1) = run_ranks([17, 16], tmp_path)
    assert code_1 == 0, output_1
    assert code_0 == 3, output_0
    assert "rank 1 of 2" in output_0


@pytest.mark.gpu
@pytest.mark.parametrize("launch_pdl", [False, True])
def test_ranks_on_streams_of_one_gpu(launch_pdl: bool, device: torch.device) -> None:
    """Both phases in one launch, all ranks at once, each a stream; also in replayed graphs."""
    # A rank's next calls, started early, wait on the processors beside its first. Here, unlike
    # with a GPU for each rank, they would take the other ranks' room, for which the first waits:
    # with them, messages are so small that all calls of all ranks have room at once.
    world_size, size = 4, 8192 if launch_pdl else 64 * 4096
    parts = make_parts(world_size, size, torch.bfloat16, device)
    # Loading a kernel may wait for those that run, which would wait for it: compile and load all
    # ranks' kernels on a group that gives up at once.
    for peers in make_group(world_size, device):
        one_shot_all_reduce(parts[0], peers, deadline_s=SHORT_S, launch_pdl=launch_pdl)
    torch.cuda.synchronize()
    group = make_group(world_size, device)
    outs = [torch.empty_like(parts[0]) for _ in group]
    streams = [torch.cuda.Stream() for _ in group]
    graphs = [torch.cuda.CUDAGraph() for _ in group]

    def calls(rank: int) -> None:
        for _ in range(5):
            one_shot_all_reduce(parts[rank], group[rank], out=outs[rank], launch_pdl=launch_pdl)

    torch.cuda.synchronize()
    for peers, stream in zip(group, streams, strict=True):
        with torch.cuda.stream(stream):
            calls(peers.rank)
    torch.cuda.synchronize()
    for peers, stream, graph in zip(group, streams, graphs, strict=True):
        with torch.cuda.graph(graph, stream=stream):
            calls(peers.rank)
    expected = one_shot_all_reduce_reference(parts)
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for out in outs:
            assert torch.equal(out, outs[0])
        assert_close(outs[0], expected)
    assert_well(group, 105)


@pytest.mark.parametrize(
    ("make_x", "make_options", "message"),
    [
        (lambda: torch.zeros(4, dtype=torch.int32), dict, "int32"),
        (lambda: torch.zeros(4, 4).T, dict, "contiguous"),
        (lambda: torch.zeros(300), dict, "1200 bytes.*1024"),
        (lambda: torch.zeros(4), lambda: {"residual": torch.zeros(5)}, r"residual is \[5\]"),
        (lambda: torch.zeros(4), lambda: {"out": torch.zeros(4).half()}, "out is .*float16"),
        (lambda: torch.zeros(4), lambda: {"out": torch.zeros(8)[::2]}, "out has strides"),
    ],
    ids=["dtype", "strides", "size", "residual", "out", "out strides"],
)
def test_messages_it_refuses(
    make_x: Callable[[], Tensor],
    make_options: Callable[[], dict[str, Tensor]],
    message: str,
    device: torch.device,
) -> None:
    group = make_group(2, device, max_bytes=1024)
    with device:
        x, options = make_x(), make_options()
    with pytest.raises(ValueError, match=message):
        one_shot_all_reduce(x, group[0], **options)


@pytest.mark.parametrize(
    ("world_size", "rank", "max_bytes", "message"),
    [(1, 0, 1024, "of 1"), (2, 2, 1024, "rank 2"), (17, 0, 1024, "of 17"), (2, 0, 1000, "1000")],
)
def test_groups_it_refuses(world_size: int, rank: int, max_bytes: int, message: str) -> None:
    buffer = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        make_peers(buffer, (1 << 40,) * world_size, rank=rank, max_bytes=max_bytes)
    with pytest.raises(ValueError, match=r"buffer is \[1\] torch.uint8; give \[4096\]"):
        make_peers(buffer, (1, 2), rank=0, max_bytes=1024)
