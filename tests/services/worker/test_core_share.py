"""Cores are divided among the workers that compute right now."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.worker import core_share
from services.worker.core_share import AllCores, CoreShare, share_cores, shared_file

Make = Callable[[], tuple[CoreShare, list[int]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make_share() -> tuple[CoreShare, list[int]]:
        counts: list[int] = []
        share = CoreShare(tmp_path / "cores", num_cores=8, set_num_threads=counts.append)
        return share, counts

    return make_share


def claim_as_other_process(monkeypatch: pytest.MonkeyPatch, make: Make, pid: int) -> CoreShare:
    """A share whose slot carries the id of another process."""
    with monkeypatch.context() as patch:
        patch.setattr(core_share.os, "getpid", lambda: pid)
        return make()[0]


def test_a_worker_alone_takes_all_cores_and_says_so_once(make: Make) -> None:
    share, counts = make()
    for _ in range(3):
        share.adjust()
    assert counts == [8]


def test_computing_workers_divide_the_cores_until_they_are_idle(make: Make) -> None:
    (first, first_counts), (second, second_counts) = make(), make()
    first.adjust()
    second.adjust()
    first.adjust()
    assert (first_counts, second_counts) == ([8, 4], [4])
    first.leave()
    second.adjust()
    assert second_counts == [4, 8]


def test_nobody_gets_less_than_one_core(make: Make) -> None:
    shares = [make() for _ in range(12)]
    for _ in range(2):
        for share, _ in shares:
            share.adjust()
    assert [counts[-1] for _, counts in shares] == [1] * 12


def test_dead_worker_does_not_count_and_its_slot_is_used_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = claim_as_other_process(monkeypatch, make, gone.pid)
    dead.adjust()
    share, counts = make()
    share.adjust()
    gone.kill()
    # Killed, but not noticed by its parent yet.
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    share.adjust()
    assert counts == [4, 8]
    gone.communicate()
    share.adjust()
    assert counts == [4, 8]
    assert make()[0]._mine == dead._mine


def test_process_that_got_the_id_of_a_dead_worker_does_not_count(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(core_share, "_start_time", lambda pid: 1)
        dead = make()[0]
    dead.adjust()
    share, counts = make()
    share.adjust()
    assert counts == [8]
    assert share._mine == dead._mine


def test_file_that_cannot_be_used_leaves_all_cores_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cores"
    file.mkdir()
    share = share_cores(file, num_cores=8, set_num_threads=lambda number: None)
    assert isinstance(share, AllCores)
    assert len(caplog.records) == 1 and str(file) in caplog.text


def test_file_system_without_locks_leaves_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    num_open = len(os.listdir("/proc/self/fd"))
    share = share_cores(tmp_path / "cores", num_cores=8, set_num_threads=lambda number: None)
    assert isinstance(share, AllCores)
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_more_workers_than_slots_still_compute(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(core_share.NUM_SLOTS):
        make()
    share, counts = make()
    share.adjust()
    share.leave()
    assert counts == [8]


def test_workers_on_other_cores_use_another_file() -> None:
    assert shared_file([0, 1]) == shared_file([1, 0])
    assert shared_file([0, 1]) != shared_file([2, 3])
