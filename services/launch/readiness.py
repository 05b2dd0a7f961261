"""Waiting for the system to serve: the router's /health, with a deadline and a readable failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx

from baton.core.errors import Unavailable

POLL_S = 0.1


def wait_until_healthy(
    url: str,
    *,
    timeout_s: float,
    still_running: Callable[[], str | None],
    stop: threading.Event,
) -> bool:
    """True when GET `url`/health answers 200, False when `stop` is set first.

    `still_running` is asked on each round and returns why waiting is pointless, or None. Raises
    Unavailable with the last reason when that happens or `timeout_s` passes.
    """
    deadline = time.monotonic() + timeout_s
    last = "no answer yet"
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            failure = still_running()
            if failure is not None:
                raise Unavailable(failure)
            try:
                response = client.get(f"{url}/health")
                if response.status_code == 200:
                    return True
                last = f"HTTP {response.status_code}: {response.text[:200]}"
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            if stop.wait(POLL_S):
                return False
    raise Unavailable(f"not ready after {timeout_s:.0f} s; the last answer was: {last}")
