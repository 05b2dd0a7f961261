"""Processes are killed under running streams: no hang, no wrong text, service returns by itself."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from running_system import RunningSystem

pytestmark = pytest.mark.model

PROMPT = list(range(1000, 1200))
MAX_TOKENS = 200
DEADLINE_S = 90.0


@pytest.fixture(scope="module")
def fragile(
    start_system: Callable[..., RunningSystem], exact_arguments: list[str]
) -> RunningSystem:
    """A system of its own, because its workers get killed."""
    return start_system(*exact_arguments)


def body(system: RunningSystem, **changes: Any) -> dict[str, Any]:
    models = httpx.get(f"{system.url}/v1/models", trust_env=False).json()
    return {
        "model": models["data"][0]["id"],
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        **changes,
    }


def complete(system: RunningSystem) -> str:
    response = httpx.post(
        f"{system.url}/v1/completions", json=body(system), timeout=DEADLINE_S, trust_env=False
    )
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["text"]
    assert isinstance(text, str)
    return text


def stream_with(system: RunningSystem, at_chunk: int, action: Callable[[], None]) -> str:
    """Stream a completion, run `action` once `at_chunk` chunks have come, return the text."""
    text = ""
    chunks = 0
    with httpx.stream(
        "POST",
        f"{system.url}/v1/completions",
        json=body(system, stream=True),
        timeout=DEADLINE_S,
        trust_env=False,
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            message = json.loads(line[6:])
            assert "error" not in message, message
            text += "".join(c["text"] for c in message["choices"])
            chunks += 1
            if chunks == at_chunk:
                threading.Thread(target=action).start()
    return text


def kill(system: RunningSystem, role: str) -> None:
    for worker_id, welcome in system.workers().items():
        if worker_id.startswith(role):
            os.kill(welcome.info.pid, signal.SIGKILL)


def wait_for_worker(system: RunningSystem, role: str, old_epoch: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            infos = [w.info for w in system.workers().values()]
        except Exception:
            infos = []
        if any(i.worker_id.startswith(role) and i.epoch != old_epoch for i in infos):
            return
        assert time.monotonic() < deadline, f"no new {role} worker"
        time.sleep(0.2)


def epoch(system: RunningSystem, role: str) -> str:
    return next(w.info.epoch for i, w in system.workers().items() if i.startswith(role))


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_killed_worker_costs_a_pause_and_no_token(fragile: RunningSystem, role: str) -> None:
    expected = complete(fragile)
    old = epoch(fragile, role)
    text = stream_with(fragile, 20, lambda: kill(fragile, role))
    assert text == expected
    wait_for_worker(fragile, role, old)
    assert complete(fragile) == expected
    fragile.assert_nothing_leaked()


def test_stopped_decode_worker_does_not_hang_the_client(fragile: RunningSystem) -> None:
    expected = complete(fragile)
    pid = next(w.info.pid for i, w in fragile.workers().items() if i.startswith("decode"))
    try:
        text = stream_with(fragile, 20, lambda: os.kill(pid, signal.SIGSTOP))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert text == expected
    deadline = time.monotonic() + DEADLINE_S
    while complete(fragile) != expected:
        assert time.monotonic() < deadline
    fragile.assert_nothing_leaked()
