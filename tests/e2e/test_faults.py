"""Processes are killed under running streams: no hang, no wrong text, service returns by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from completions import complete, stream_with
from running_system import RunningSystem

pytestmark = pytest.mark.model

DEADLINE_S = 90.0


@pytest.fixture(scope="module", params=["--no-ray", pytest.param("--ray", marks=pytest.mark.slow)])
def fragile(
    request: pytest.FixtureRequest,
    start_system: Callable[..., RunningSystem],
    exact_arguments: list[str],
) -> Iterator[RunningSystem]:
    """A system of its own, because its workers get killed."""
    system = start_system(*exact_arguments, request.param)
    yield system
    system.kill()


def kill(system: RunningSystem, role: str) -> None:
    os.kill(system.worker(role).pid, signal.SIGKILL)


def wait_for_new_worker(system: RunningSystem, role: str, old_epoch: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(grpc.RpcError, ValueError):
            if system.worker(role).epoch != old_epoch:
                return
        assert time.monotonic() < deadline, f"no new {role} worker"
        time.sleep(0.2)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_killed_worker_costs_a_pause_and_no_token(fragile: RunningSystem, role: str) -> None:
    expected = complete(fragile)
    old_epoch = fragile.worker(role).epoch
    text = stream_with(fragile, 20, lambda: kill(fragile, role))
    assert text == expected
    wait_for_new_worker(fragile, role, old_epoch)
    assert complete(fragile) == expected
    fragile.assert_nothing_leaked()


def test_stopped_decode_worker_does_not_hang_the_client(fragile: RunningSystem) -> None:
    expected = complete(fragile)
    pid = fragile.worker("decode").pid
    try:
        text = stream_with(fragile, 20, lambda: os.kill(pid, signal.SIGSTOP))
    finally:
        # Ray may have replaced and killed it by now.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert text == expected
    deadline = time.monotonic() + DEADLINE_S
    while complete(fragile) != expected:
        assert time.monotonic() < deadline
    fragile.assert_nothing_leaked()
