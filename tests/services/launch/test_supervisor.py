"""The supervisor: restarts what dies, gives up readably, stops everything in time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.launch import supervisor as supervision
from services.launch.supervisor import Child, Supervisor


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(supervision, "RESTART_BACKOFF_S", 0.05)
    supervisor = Supervisor()
    yield supervisor
    supervisor.stop(grace_s=1)


def child(tmp_path: Path, code: str) -> Child:
    return Child(
        name="worker",
        command=[sys.executable, "-c", code],
        log_file=tmp_path / "worker.log",
        backoff_s=supervision.RESTART_BACKOFF_S,
    )


def poll_until(supervisor: Supervisor, condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        supervisor.poll()
        time.sleep(0.02)


def test_killed_child_is_started_again(supervisor: Supervisor, tmp_path: Path) -> None:
    it = child(tmp_path, "import time; time.sleep(60)")
    supervisor.start(it)
    assert it.process is not None
    first_pid = it.process.pid
    it.process.kill()
    poll_until(supervisor, lambda: it.process is not None and it.process.pid != first_pid)
    assert it.num_exits == 1


def test_child_that_keeps_dying_is_reported_with_its_log(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    supervisor.start(child(tmp_path, "raise SystemExit('the model folder is empty')"))
    poll_until(supervisor, lambda: supervisor.hopeless() is not None)
    reason = supervisor.hopeless()
    assert reason is not None
    assert "worker exited 3 times" in reason
    assert "the model folder is empty" in reason


def test_stop_ends_children_that_ignore_sigterm(supervisor: Supervisor, tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', flush=True); time.sleep(60)"
    )
    it = child(tmp_path, code)
    supervisor.start(it)
    poll_until(supervisor, lambda: "deaf" in it.log_file.read_text())
    assert it.process is not None
    pid = it.process.pid
    start = time.monotonic()
    supervisor.stop(grace_s=0.5)
    assert time.monotonic() - start < 3
    assert not psutil.pid_exists(pid)


def test_nothing_is_restarted_after_stop(supervisor: Supervisor, tmp_path: Path) -> None:
    it = child(tmp_path, "import time; time.sleep(60)")
    supervisor.start(it)
    supervisor.stop(grace_s=2)
    for _ in range(10):
        supervisor.poll()
        time.sleep(0.02)
    assert it.process is not None
    assert it.process.poll() is not None


def test_routers_end_before_the_others(supervisor: Supervisor, tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        f"    open({str(order)!r}, 'a').write(sys.argv[1]); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    )
    for name, is_front in (("r", True), ("w", False), ("r", True)):
        command = [sys.executable, "-c", code, name]
        log_file = tmp_path / f"{len(supervisor.children)}.log"
        supervisor.start(Child(name, command, log_file, is_front=is_front))
    poll_until(supervisor, lambda: all("up" in c.log_file.read_text() for c in supervisor.children))
    supervisor.stop(grace_s=10)
    assert order.read_text() == "rrw"
