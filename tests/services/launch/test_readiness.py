"""Waiting for several router copies, and looking for Redis before anything starts."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from baton.core.errors import ConfigError, Unavailable
from redis_server import RedisServer
from services.launch.readiness import check_model_folder, check_redis, wait_until_copies_healthy
from services.router.edge.scrape_target import ScrapeTarget, write_target


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_all_copies_must_be_healthy(tmp_path: Path, address: str) -> None:
    one = ScrapeTarget(address, "router-0", os.getpid())
    two = ScrapeTarget(address, "router-1", os.getpid())
    write_target(tmp_path, one)
    with pytest.raises(Unavailable, match="1 of 2 routers came up"):
        wait_until_copies_healthy(tmp_path, 2, timeout_s=0.3, still_running=lambda: None)
    write_target(tmp_path, two)
    found = wait_until_copies_healthy(tmp_path, 2, timeout_s=10, still_running=lambda: None)
    assert found == [one, two]


def test_waiting_ends_when_it_is_hopeless(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="router-1 exited 3 times"):
        wait_until_copies_healthy(
            tmp_path, 2, timeout_s=60, still_running=lambda: "router-1 exited 3 times"
        )


def test_redis_that_does_not_answer_is_refused_before_the_start(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="--redis: Redis cannot be reached"):
            check_redis(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
    server = RedisServer(tmp_path, password="right")
    server.start()
    try:
        check_redis(server.url)
        with pytest.raises(ConfigError, match="user or password"):
            check_redis(server.url.replace("right", "wrong"))
    finally:
        server.stop()


def test_a_model_folder_needs_weights_where_they_are_read(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).touch()
    check_model_folder(tmp_path, has_weights=False)
    with pytest.raises(ConfigError, match=r"has no \*.safetensors; give a Hugging Face folder"):
        check_model_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    check_model_folder(tmp_path)
