"""Before and after a start: model folder, free ports, and then the router's /health."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import redis

from baton.core.errors import ConfigError, Unavailable
from baton.registry.redis_connection import redis_failure
from services.router.edge.scrape_target import ScrapeTarget, read_targets

POLL_S = 0.1
REDIS_TIMEOUT_S = 3.0


def check_ports_free(host: str, ports: dict[str, int]) -> None:
    """Raises ConfigError naming the first option of `ports` whose port cannot be listened on.

    Without this a server that already runs there would answer in our place.
    """
    for option, port in ports.items():
        error = listen_error(host, port)
        if error is not None:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port "
                f"with {option}"
            ) from error


def listen_error(host: str, port: int) -> OSError | None:
    """Why nobody can listen there now; None when one can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def check_model_folder(folder: Path, *, has_weights: bool = True) -> None:
    """Raises ConfigError naming what a Hugging Face folder must hold and this one does not.

    `has_weights` False where no worker reads any.
    """
    if not folder.is_dir():
        raise ConfigError(f"model folder {folder} does not exist")
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if has_weights and not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ConfigError(
            f"model folder {folder} has no {', '.join(missing)}; give a Hugging Face folder, or "
            "make one of a GGUF file with `baton model import --gguf FILE`"
        )


def check_redis(url: str) -> None:
    """Raises ConfigError when nothing answers there: no worker would be found by the routers."""
    with redis.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_S) as client:
        try:
            client.ping()
        except (redis.RedisError, OSError) as error:
            raise ConfigError(f"--redis: {redis_failure(error)}") from error


def wait_until_copies_healthy(
    directory: Path,
    num_copies: int,
    *,
    timeout_s: float,
    still_running: Callable[[], str | None],
) -> list[ScrapeTarget]:
    """The copies, once `num_copies` have named themselves in `directory` and are healthy.

    Raises Unavailable as `wait_until_healthy`.
    """
    deadline = time.monotonic() + timeout_s
    while len(targets := read_targets(directory)) < num_copies:
        failure = still_running()
        if failure is None and time.monotonic() > deadline:
            failure = f"{len(targets)} of {num_copies} routers came up in {timeout_s:.0f} s"
        if failure is not None:
            raise Unavailable(failure)
        time.sleep(POLL_S)
    for target in targets:
        wait_until_healthy(
            f"http://{target.address}",
            timeout_s=max(0.0, deadline - time.monotonic()),
            still_running=still_running,
        )
    return targets


def wait_until_healthy(
    url: str,
    *,
    timeout_s: float,
    still_running: Callable[[], str | None],
) -> None:
    """Return when GET `url`/health answers 200.

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
                    return
                last = f"HTTP {response.status_code}: {response.text[:200]}"
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            time.sleep(POLL_S)
    raise Unavailable(f"not ready after {timeout_s:.0f} s; the last answer was: {last}")
