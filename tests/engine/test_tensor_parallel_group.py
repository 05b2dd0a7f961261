"""A rank that dies, hangs or fails takes its group down with one error, and nothing is left."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from baton.core.clock import ManualClock
from baton.core.errors import ConfigError, Unavailable
from baton.core.request import FinishReason, GenerateRequest, RequestId, SamplingParams, Work
from baton.engine import factory
from baton.engine.batch import SequenceSlice
from baton.engine.config import Device, EngineConfig
from baton.engine.engine import BatchOutcome
from baton.engine.factory import BuiltEngine, build_engine, connect_ranks
from baton.engine.model_runner import ModelRunner
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel import group as group_module
from baton.engine.tensor_parallel.group import RankGroup
from baton.engine.tensor_parallel.rendezvous import Rendezvous
from baton.engine.tensor_parallel.step_clock import StepClock, StepCount
from tiny_llama import write_checkpoint

NOTICED_S = 3.0
"""A second on an idle machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), num_key_value_heads=4)


@pytest.fixture
def build(folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., BuiltEngine]]:
    """Engines over several ranks; at the end no process, thread or descriptor may be left."""
    # Of earlier tests, whatever they were.
    gc.collect()
    fds_before = open_files()
    built: list[BuiltEngine] = []

    def make(tp_size: int = 2, **settings: Any) -> BuiltEngine:
        config = EngineConfig(
            model_path=folder,
            dtype="float32",
            tp_size=tp_size,
            num_threads=1,
            kv_cache_bytes=1 << 18,
            **settings,
        )
        built.append(build_engine(config, clock=ManualClock()))
        return built[-1]

    yield make
    pids = [pid for one in built for pid in ranks_of(one).pids]
    while built:
        start_s = time.monotonic()
        ranks_of(built.pop()).close()
        assert time.monotonic() - start_s < NOTICED_S
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not [t for t in threading.enumerate() if "ranks" in t.name]
    # The rest lives as long as the engines do, which logged exceptions refer to.
    caplog.get_records("call").clear()
    gc.collect()
    assert open_files() == fds_before


def open_files() -> list[str]:
    """What groups have open, by name: their own files and the pools' memory."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sorted(link for link in links if "baton-" in link)


def ranks_of(built: BuiltEngine) -> RankGroup:
    assert built.ranks is not None
    return built.ranks


def failure_of(group: RankGroup) -> str:
    """The group's failure, which is expected to show within NOTICED_S."""
    reasons: list[str] = []
    heard = threading.Event()

    def listener(reason: str) -> None:
        reasons.append(reason)
        heard.set()

    group.on_failure(listener)
    assert heard.wait(NOTICED_S), "nobody noticed"
    time.sleep(0.1)
    assert len(reasons) == 1
    return reasons[0]


def submit(built: BuiltEngine, name: str = "r", max_tokens: int = 100) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    built.engine.submit(GenerateRequest(RequestId(name), Work.GENERATE, (1, 2, 3), sampling))


def test_killed_idle_rank_ends_all_others(build: Callable[..., BuiltEngine]) -> None:
    built = build(4)
    group = ranks_of(built)
    os.kill(group.pids[1], signal.SIGKILL)
    reason = failure_of(group)
    assert reason == (
        "the tensor-parallel group of 4 ranks is lost: "
        f"rank 2 of 4 (process {group.pids[1]}) was killed by SIGKILL"
    )
    submit(built)
    (delta,) = built.engine.step().deltas
    assert delta.error.endswith(reason)
    assert delta.is_retryable


def test_rank_killed_in_the_middle_of_steps(build: Callable[..., BuiltEngine]) -> None:
    built = build()
    group = ranks_of(built)
    submit(built)
    for _ in range(3):
        assert built.engine.step().batch is BatchOutcome.COMPUTED
    threading.Timer(0.05, os.kill, (group.pids[0], signal.SIGKILL)).start()
    deadline = time.monotonic() + NOTICED_S
    output = built.engine.step()
    while output.batch is BatchOutcome.COMPUTED:
        assert time.monotonic() < deadline
        if not built.engine.has_work:
            submit(built)
        output = built.engine.step()
    (delta,) = output.deltas
    assert delta.finish_reason is FinishReason.ERROR
    assert "rank 1 of 2" in delta.error
    assert "was killed by SIGKILL" in delta.error
    assert built.engine.is_empty
    built.engine.check_integrity()


def test_stopped_rank_is_given_up(build: Callable[..., BuiltEngine]) -> None:
    built = build(rank_timeout_s=1.0)
    group = ranks_of(built)
    submit(built)
    os.kill(group.pids[0], signal.SIGSTOP)
    start_s = time.monotonic()
    (delta,) = built.engine.step().deltas
    assert 1.0 < time.monotonic() - start_s < 1.0 + NOTICED_S
    assert "a step did not end within 1 s; rank 1 is stopped by a signal" in delta.error


def test_exception_in_a_rank_names_its_kind(build: Callable[..., BuiltEngine]) -> None:
    group = ranks_of(build())
    impossible = SequenceSlice(
        request_id=RequestId("r"),
        first_position=0,
        token_ids=(10**6,),
        has_pending_token=False,
        block_table=(),
        samples=True,
    )
    group.send_step((impossible,), num_threads=1)
    reason = failure_of(group)
    assert "rank 1 of 2 failed: IndexError; the worker's log holds the details" in reason
    with pytest.raises(Unavailable, match="rank 1 of 2 failed"):
        group.send_step((), num_threads=1)


def test_exception_in_rank_0_ends_the_group(
    build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build()
    group = ranks_of(built)
    monkeypatch.setattr(group_module, "CAUSE_TIMEOUT_S", 0.2)

    def launch_slices(runner: object, batch: object, slices: object) -> None:
        raise FloatingPointError("in rank 0")

    monkeypatch.setattr(ModelRunner, "launch_slices", launch_slices)
    submit(built)
    (delta,) = built.engine.step().deltas
    assert "rank 0 of 2 failed: FloatingPointError" in delta.error
    assert "rank 0 of 2 failed" in failure_of(group)


def test_what_only_another_rank_finds_wrong_is_a_wrong_setting(folder: Path) -> None:
    config = EngineConfig(model_path=folder / "absent", tp_size=2, dtype="float32")
    group = RankGroup(config)
    group.start()
    group.wait_until_started()
    connect_ranks(config, Parallel(0, 2), rendezvous=Rendezvous(group.rendezvous), timeout_s=30)
    with pytest.raises(ConfigError, match=r"rank 1 of 2 failed: .*config\.json"):
        group.wait_until_ready()
    group.close()


def test_rank_killed_while_ranks_meet(
    build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    killed_at_s = 0.0
    wait_until_started = RankGroup.wait_until_started

    def kill_first(group: RankGroup) -> None:
        nonlocal killed_at_s
        wait_until_started(group)
        pids.extend(group.pids)
        os.kill(pids[0], signal.SIGKILL)
        killed_at_s = time.monotonic()

    monkeypatch.setattr(RankGroup, "wait_until_started", kill_first)
    with pytest.raises(Unavailable, match=r"lost: rank 1 of 4 \(.*\) was killed by SIGKILL"):
        build(4)
    assert time.monotonic() - killed_at_s < NOTICED_S
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_call_that_cannot_be_interrupted_is_left_behind(folder: Path) -> None:
    group = RankGroup(EngineConfig(model_path=folder, tp_size=2))
    release = threading.Event()
    interrupts: list[str] = []
    threading.Timer(0.1, group.fail, ("rank 1 of 2 left",)).start()
    start_s = time.monotonic()
    with pytest.raises(Unavailable, match="rank 1 of 2 left"):
        group.unless_lost(lambda: release.wait(60), lambda: interrupts.append("once"))
    assert time.monotonic() - start_s < NOTICED_S
    assert interrupts == ["once"]
    release.set()
    group.close()


def test_lost_rank_is_named_though_rank_0_fails_of_it_first(
    build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = RankGroup.start
    groups: list[RankGroup] = []

    def remember(group: RankGroup) -> None:
        groups.append(group)
        start(group)

    def fail_at_once(*args: object, **kwargs: object) -> None:
        os.kill(groups.pop().pids[0], signal.SIGKILL)
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(RankGroup, "start", remember)
    monkeypatch.setattr(factory, "build_rank", fail_at_once)
    with pytest.raises(Unavailable, match=r"rank 1 of 2 \(.*\) was killed by SIGKILL"):
        build()


def test_pool_that_cannot_be_shared_is_closed(
    build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(group: RankGroup, fd: int, num_bytes: int) -> None:
        raise Unavailable("not to be shared")

    monkeypatch.setattr(RankGroup, "share_pool", cannot)
    with pytest.raises(Unavailable, match="not to be shared"):
        build()


def test_listener_that_fails_does_not_keep_others_from_hearing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = RankGroup(EngineConfig(model_path=folder, tp_size=2))
    reasons: list[str] = []

    def defect(reason: str) -> None:
        raise ZeroDivisionError("defect")

    for listener in (defect, reasons.append):
        group.on_failure(listener)
    group.fail("rank 1 of 2 left")
    group.on_failure(defect)
    assert reasons == ["the tensor-parallel group of 2 ranks is lost: rank 1 of 2 left"]
    assert caplog.text.count("ZeroDivisionError: defect") == 2
    group.close()


@pytest.mark.parametrize(
    ("num_gpus", "message"),
    [
        (0, "device cuda was asked for, but torch finds no GPU"),
        (1, "rank 1 needs GPU 1, but 1 are visible; lower tp_size or make more GPUs visible"),
    ],
)
def test_missing_gpus_are_found_before_any_process_is_started(
    build: Callable[..., BuiltEngine],
    monkeypatch: pytest.MonkeyPatch,
    num_gpus: int,
    message: str,
) -> None:
    def start(group: RankGroup) -> None:
        raise AssertionError("the group was started")

    monkeypatch.setattr(RankGroup, "start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigError, match=message):
        build(device=Device.CUDA)


def test_multicast_is_off_in_all_ranks(
    build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    for name in off:
        # Set first, so that it is put back to what it was.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (rank,) = ranks_of(build()).pids
    assert {name: os.environ.get(name) for name in off} == off
    environ = psutil.Process(rank).environ()
    assert {name: environ.get(name) for name in off} == off


def test_log_of_a_rank_is_written_by_rank_0(
    build: Callable[..., BuiltEngine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (pid,) = ranks_of(build()).pids
    lines = [r for r in caplog.records if r.getMessage().startswith("rank 1: ready")]
    assert [(r.levelname, getattr(r, "fields", None)) for r in lines] == [
        ("INFO", {"pid": pid, "rank": 1})
    ]


ROOT_PROGRAM = """
import sys, time
from pathlib import Path
from baton.core.clock import ManualClock
from baton.engine.config import Device, EngineConfig
from baton.engine.factory import build_engine
config = EngineConfig(model_path=Path(sys.argv[1]), dtype="float32", tp_size=2, num_threads=1)
print(build_engine(config, clock=ManualClock()).ranks.pids[0], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_ranks_die_with_a_killed_rank_0(folder: Path, is_stopped: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ROOT_PROGRAM, str(folder)], stdout=subprocess.PIPE
    ) as root:
        assert root.stdout is not None
        rank = psutil.Process(int(root.stdout.readline()))
        if is_stopped:
            rank.suspend()
        root.kill()
        gone, alive = psutil.wait_procs([rank], NOTICED_S)
        assert (len(gone), alive) == (1, [])


def test_only_time_in_which_the_watcher_ran_makes_a_step_overdue() -> None:
    clock = StepClock(1.0, 100.0)
    times = iter([100.25, 160.0, 160.1, 160.5, 161.0])
    found = [clock.is_overdue(t, StepCount(1, 0)) for t in times]
    assert found == [False, False, False, True, True]


def test_steps_that_end_or_are_not_there_are_never_overdue() -> None:
    clock = StepClock(1.0, 100.0)
    for i in range(20):
        now_s = 100.0 + 0.4 * i
        assert not clock.is_overdue(now_s, StepCount(2 + i // 2, i // 2))
    for i in range(20):
        assert not clock.is_overdue(110.0 + i, StepCount(9, 9))
