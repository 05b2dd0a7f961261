"""The planner's thread: whatever a step does, the next one comes, and stopping ends it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest

from baton.core.clock import ManualClock
from services.launch import planner_thread
from services.launch.planner_thread import PlannerThread

WAIT_S = 10.0


def wait_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_failing_step_is_logged_once_counted_every_time_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times: list[float] = []
    failures: list[int] = []

    def step(now_s: float) -> None:
        times.append(now_s)
        if len(times) < 4:
            raise ValueError("no figures")

    thread = PlannerThread(
        step, clock=ManualClock(7.0), interval_s=0.01, failed=lambda: failures.append(1)
    )
    with caplog.at_level(logging.ERROR):
        thread.start()
        wait_for(lambda: len(times) > 5)
        thread.stop(WAIT_S)
    assert set(times) == {7.0}
    assert len(failures) == 3
    assert caplog.text.count("a decision failed") == 1
    assert not any(thread.name == "autoscaler" for thread in threading.enumerate())


def test_step_that_hangs_is_told_once_and_does_not_keep_stop_waiting(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_thread, "LATE_S", 0.05)
    may_end = threading.Event()
    thread = PlannerThread(
        lambda now_s: may_end.wait(WAIT_S) and None, clock=ManualClock(0.0), interval_s=0.005
    )
    thread.start()
    with caplog.at_level(logging.ERROR):
        wait_for(lambda: [thread.tell_if_late(), "no decision for" in caplog.text][1])
        thread.tell_if_late()
    assert caplog.text.count("no decision for") == 1
    thread.stop(0.05)
    may_end.set()
    wait_for(lambda: not any(t.name == "autoscaler" for t in threading.enumerate()))


def test_stop_before_start_is_no_error() -> None:
    PlannerThread(lambda now_s: None, clock=ManualClock(0.0), interval_s=1.0).stop(1.0)
