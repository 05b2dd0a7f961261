"""Pools of real processes, as a planner changes them: nothing hangs, nothing is left."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

import idle_worker
from baton.core.clock import MonotonicClock
from baton.core.errors import RoleChangeRefused, Unavailable
from baton.core.tls import TlsFiles
from baton.core.worker_info import Role
from baton.registry.directory import DirectoryRegistry
from services.launch import process_pools
from services.launch import supervisor as supervision
from services.launch.background import BackgroundLoop
from services.launch.process_pools import PoolTimes, ProcessPools
from services.launch.supervisor import Child, Supervisor
from services.planner.actuator import PlannedWorker, WorkerPhase

WAIT_S = 20.0


@dataclass
class Launcher:
    """Idle workers, of which at most `room` fit."""

    folder: Path
    manner: str = "plain"
    room: int = 4

    def command(self, role: Role, name: str) -> list[str]:
        file = str(Path(idle_worker.__file__))
        options = ["--name", name, "--role", role.value, "--manner", self.manner]
        return [sys.executable, file, *options, "--registry", str(self.folder / "registry")]

    def child(self, role: Role, index: int, environment: Mapping[str, str]) -> Child:
        name = f"{role.value}-{index}"
        return Child(
            name, self.command(role, name), self.folder / f"{name}.log", environment=environment
        )

    def another(self, role: Role, children: Iterable[Child]) -> Child:
        names = {child.name for child in children}
        if len(names) >= self.room:
            raise Unavailable("no GPU is free")
        index = next(i for i in range(self.room) if f"{role.value}-{i}" not in names)
        return self.child(role, index, {})


@dataclass
class World:
    """One decode worker runs; everything else is up to the test."""

    folder: Path
    launcher: Launcher
    supervisor: Supervisor = field(default_factory=Supervisor)
    jobs: BackgroundLoop = field(default_factory=lambda: BackgroundLoop("jobs"))
    changed: list[tuple[str, Role]] = field(default_factory=list)
    may_change: threading.Event = field(default_factory=threading.Event)
    pools: ProcessPools = field(init=False)

    def __post_init__(self) -> None:
        clock = MonotonicClock()
        self.pools = ProcessPools(
            self.supervisor,
            self.launcher,
            DirectoryRegistry(self.folder / "registry", clock=clock),
            self.jobs,
            clock,
            clock,
            PoolTimes(drain_s=5.0, start_s=10.0, end_s=0.5),
            self._change,
        )
        self.supervisor.start(self.launcher.child(Role.DECODE, 0, {}))
        self.jobs.start()

    async def _change(self, address: str, role: Role, tls: TlsFiles | None) -> None:
        self.changed.append((address, role))
        await asyncio.to_thread(self.may_change.wait, WAIT_S)

    def seen(self) -> dict[str, PlannedWorker]:
        self.supervisor.poll()
        return {worker.name: worker for worker in self.pools.workers()}

    def phases(self) -> dict[str, WorkerPhase]:
        return {name: worker.phase for name, worker in self.seen().items()}

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_there():
            assert time.monotonic() < deadline, f"not in time; there is {self.seen()}"
            time.sleep(0.05)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(supervision, "RESTART_BACKOFF_S", 0.05)
    world = World(tmp_path, Launcher(tmp_path))
    world.wait_for(lambda: world.phases() == {"decode-0": WorkerPhase.READY})
    yield world
    world.jobs.stop(5)
    pids = [child.pid for child in world.supervisor.all() if child.pid is not None]
    world.supervisor.stop(grace_s=1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_started_worker_joins_and_a_drained_one_is_gone_for_good(world: World) -> None:
    assert world.seen()["decode-0"].joined_s == float("-inf")
    asked_s = time.monotonic()
    world.pools.start(Role.DECODE)
    assert world.pools.workers()[1].phase is WorkerPhase.STARTING
    world.wait_for(lambda: world.phases().get("decode-1") is WorkerPhase.READY)
    assert asked_s < world.seen()["decode-1"].joined_s <= time.monotonic()
    world.pools.drain("decode-0")
    world.wait_for(lambda: list(world.phases()) == ["decode-1"])
    assert "draining" in world.log("decode-0")
    for _ in range(10):
        assert list(world.phases()) == ["decode-1"]
        time.sleep(0.02)


def test_worker_that_drains_is_shown_until_it_has_ended_and_its_name_is_free_again(
    world: World,
) -> None:
    world.launcher.manner = "slow"
    world.pools.start(Role.PREFILL)
    world.wait_for(lambda: world.phases().get("prefill-0") is WorkerPhase.READY)
    world.pools.drain("prefill-0")
    world.pools.drain("prefill-0")
    assert world.phases()["prefill-0"] is WorkerPhase.DRAINING
    world.wait_for(lambda: list(world.phases()) == ["decode-0"])
    assert world.log("prefill-0").count("draining") == 1
    world.pools.start(Role.PREFILL)
    world.wait_for(lambda: world.phases().get("prefill-0") is WorkerPhase.READY)


def test_worker_that_dies_while_it_drains_is_not_started_again(world: World) -> None:
    world.launcher.manner = "slow"
    world.pools.start(Role.DECODE)
    world.wait_for(lambda: world.phases().get("decode-1") is WorkerPhase.READY)
    child = world.supervisor.find("decode-1")
    assert child is not None and child.process is not None
    world.pools.drain("decode-1")
    child.process.kill()
    world.wait_for(lambda: list(world.phases()) == ["decode-0"])


def test_worker_that_does_not_end_is_told_and_then_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.launcher.manner = "deaf"
    world.pools.start(Role.DECODE)
    world.wait_for(lambda: world.phases().get("decode-1") is WorkerPhase.READY)
    world.pools.drain("decode-1")
    with caplog.at_level(logging.WARNING):
        world.wait_for(lambda: list(world.phases()) == ["decode-0"])
    assert "decode-1 has not ended in its time and is killed" in caplog.text


def test_starting_worker_can_be_drained(world: World) -> None:
    world.launcher.manner = "silent"
    world.pools.start(Role.DECODE)
    assert world.phases()["decode-1"] is WorkerPhase.STARTING
    world.pools.drain("decode-1")
    world.wait_for(lambda: list(world.phases()) == ["decode-0"])


def test_crashed_worker_comes_back_and_counts_as_just_joined(world: World) -> None:
    child = world.supervisor.find("decode-0")
    assert child is not None and child.process is not None
    died_s = time.monotonic()
    child.process.kill()
    world.wait_for(lambda: world.seen()["decode-0"].joined_s > died_s)


def test_worker_that_keeps_dying_is_given_up_and_its_pool_rests(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.launcher.manner = "broken"
    with caplog.at_level(logging.ERROR):
        world.pools.start(Role.DECODE)
        world.wait_for(lambda: list(world.phases()) == ["decode-0"] and bool(caplog.text))
    assert "decode-1 is given up, and no decode worker is tried for 30 s" in caplog.text
    assert "no model here" in caplog.text
    world.launcher.manner = "plain"
    world.pools.start(Role.DECODE)
    assert list(world.phases()) == ["decode-0"]
    world.pools.start(Role.PREFILL)
    world.wait_for(lambda: world.phases().get("prefill-0") is WorkerPhase.READY)


def test_worker_that_is_never_ready_is_given_up(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.launcher.manner = "silent"
    world.pools.times = PoolTimes(drain_s=5.0, start_s=0.5, end_s=0.5)
    with caplog.at_level(logging.ERROR):
        world.pools.start(Role.DECODE)
        world.wait_for(lambda: list(world.phases()) == ["decode-0"] and bool(caplog.text))
    assert "it was not ready within 0.5 s" in caplog.text


def test_worker_that_crashes_and_is_not_ready_again_is_given_up(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Else it would count as one that starts for ever, and nobody would take its place."""
    child = world.supervisor.find("decode-0")
    assert child is not None and child.process is not None
    world.launcher.manner = "silent"
    child.command = world.launcher.command(Role.DECODE, "decode-0")
    world.pools.times = PoolTimes(drain_s=5.0, start_s=0.5, end_s=0.5)
    with caplog.at_level(logging.ERROR):
        child.process.kill()
        world.wait_for(lambda: not world.phases())
    assert "decode-0 is given up" in caplog.text
    assert "it was not ready within 0.5 s" in caplog.text


def test_start_without_a_free_device_is_refused_once_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.launcher.room = 1
    with caplog.at_level(logging.ERROR):
        world.pools.start(Role.DECODE)
        world.pools.start(Role.DECODE)
    assert caplog.text.count("no GPU is free") == 1
    assert list(world.phases()) == ["decode-0"]


def test_changing_worker_shows_its_new_role_and_would_come_back_in_it(world: World) -> None:
    world.pools.change_role("decode-0", Role.PREFILL)
    changing = world.seen()["decode-0"]
    assert (changing.role, changing.phase) == (Role.PREFILL, WorkerPhase.STARTING)
    world.pools.change_role("decode-0", Role.PREFILL)
    world.may_change.set()
    child = world.supervisor.find("decode-0")
    assert child is not None
    world.wait_for(lambda: "prefill" in child.command)
    assert [role for _, role in world.changed] == [Role.PREFILL]


def test_worker_that_refuses_another_role_is_not_asked_again_for_now(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_pools, "SETTLED_S", 1.0)

    async def refuse(address: str, role: Role, tls: TlsFiles | None) -> None:
        raise RoleChangeRefused("it is the last one")

    world.pools.change = refuse
    world.pools.change_role("decode-0", Role.PREFILL)
    world.wait_for(lambda: world.seen()["decode-0"].is_settled)
    kept = world.seen()["decode-0"]
    assert (kept.role, kept.phase) == (Role.DECODE, WorkerPhase.READY)
    world.wait_for(lambda: not world.seen()["decode-0"].is_settled)


def test_orders_for_workers_that_are_gone_are_no_errors(world: World) -> None:
    world.pools.drain("decode-7")
    world.pools.change_role("decode-7", Role.PREFILL)
    world.pools.change_role("decode-0", Role.DECODE)
    assert world.phases() == {"decode-0": WorkerPhase.READY}


def test_job_that_comes_too_late_is_refused_and_nothing_stays_open() -> None:
    async def work() -> None: ...

    never_started = BackgroundLoop("jobs")
    never_started.stop(5)
    stopped = BackgroundLoop("jobs")
    stopped.start()
    stopped.stop(5)
    for jobs in (never_started, stopped):
        jobs.spawn(work(), "a late job")
        jobs.stop(5)
    del jobs, never_started, stopped
    gc.collect()


def test_job_that_fails_is_logged_and_hurts_no_other(caplog: pytest.LogCaptureFixture) -> None:
    jobs = BackgroundLoop("jobs")
    jobs.start()
    done: list[int] = []

    async def fail() -> None:
        raise ValueError("that was wrong")

    async def work() -> None:
        done.append(1)

    jobs.spawn(fail(), "a bad job")
    jobs.spawn(work(), "a good job")
    deadline = time.monotonic() + WAIT_S
    while not (done and "a bad job" in caplog.text):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    jobs.stop(5)
