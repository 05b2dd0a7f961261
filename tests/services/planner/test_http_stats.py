"""Statistics over HTTP: copies found three ways, dead and broken ones left out, in bounded time."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from services.planner.http_stats import HttpStats, StatsConfig
from services.router.edge.scrape_target import ScrapeTarget, write_target
from services.router.pool_stats import PoolStats

STATS = PoolStats(12.0, num_arrived=7)


class Copy:
    """A router's port that answers `body`, or is silent."""

    def __init__(self) -> None:
        self.body = json.dumps(STATS.to_numbers()).encode()
        self.status = 200
        self.delay_s = 0.0
        copy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/pool_stats"
                copy.stop.wait(copy.delay_s)
                try:
                    self.send_response(copy.status)
                    self.send_header("content-length", str(len(copy.body)))
                    self.end_headers()
                    self.wfile.write(copy.body)
                except OSError:
                    pass

            def log_message(self, format: str, *args: object) -> None: ...

        self.stop = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.place = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def copy() -> Iterator[Copy]:
    with closing(Copy()) as copy:
        yield copy


@pytest.fixture
def dead_place() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def source(*routers: str, targets_dir: Path | None = None, timeout_s: float = 1.0) -> HttpStats:
    return HttpStats(StatsConfig(routers, targets_dir, timeout_s))


def test_a_dead_copy_is_named_and_the_others_count(copy: Copy, dead_place: str) -> None:
    reading = source(f"http://{copy.place}", f"http://{dead_place}").read()
    assert reading.copies == {copy.place: STATS}
    assert list(reading.failed) == [dead_place]
    assert "failed" in reading.failed[dead_place]


def test_a_copy_that_hangs_costs_its_time_and_no_more(copy: Copy) -> None:
    with closing(Copy()) as slow:
        slow.delay_s = 30.0
        started_s = time.monotonic()
        reading = source(f"http://{slow.place}", f"http://{copy.place}", timeout_s=0.5).read()
        assert time.monotonic() - started_s < 10
    assert reading.copies == {copy.place: STATS}
    assert reading.failed == {slow.place: "no answer within 0.5 s"}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"baton", 200, "Expecting value"),
        (b"[]", 200, "no statistics"),
        (b"{}", 200, "uptime_s must be a number, got None"),
        (json.dumps({**STATS.to_numbers(), "num_arrived": "7"}).encode(), 200, "num_arrived"),
        (b'{"uptime_s": NaN}', 200, "must be finite"),
        (b"x" * 100_000, 200, "more than 65536 bytes"),
        (b"{}", 404, "HTTP status 404 from /pool_stats: is this a router's port"),
    ],
)
def test_answers_that_are_none_say_why(copy: Copy, body: bytes, status: int, reason: str) -> None:
    copy.body, copy.status = body, status
    reading = source(f"http://{copy.place}").read()
    assert reading.copies == {} and reason in reading.failed[copy.place]


def test_numbers_of_a_newer_release_are_passed_over(copy: Copy) -> None:
    copy.body = json.dumps({**STATS.to_numbers(), "num_of_tomorrow": 1}).encode()
    assert source(f"http://{copy.place}").read().copies == {copy.place: STATS}


def test_copies_tell_in_a_directory_where_they_are(copy: Copy, tmp_path: Path) -> None:
    write_target(tmp_path, ScrapeTarget(copy.place, "router-0", os.getpid()))
    # What a planner says of itself is no router.
    write_target(tmp_path, ScrapeTarget("127.0.0.1:9", "planner", os.getpid()))
    (tmp_path / "half.json").write_text("[{")
    assert source(targets_dir=tmp_path).read().copies == {copy.place: STATS}
    empty = source(targets_dir=tmp_path / "none").read()
    assert not empty.copies and "no router has told" in next(iter(empty.failed.values()))


def test_a_name_stands_for_all_its_addresses(copy: Copy) -> None:
    port = copy.place.rpartition(":")[2]
    reading = source(f"dns://localhost:{port}").read()
    assert reading.copies[copy.place] == STATS
    lost = source("dns://name.invalid:9").read()
    assert not lost.copies and "not found" in lost.failed["dns://name.invalid:9"]


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:8000", "https://a:1", "http://a", "http://a:1/metrics", "http://a:x", "dns://:1"],
)
def test_places_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"takes http://HOST:PORT or dns://NAME:PORT"):
        StatsConfig((text,))


def test_a_source_needs_a_place() -> None:
    with pytest.raises(ConfigError, match=r"stats.routers is empty"):
        HttpStats(StatsConfig())
    with pytest.raises(ConfigError, match="256 at most"):
        StatsConfig(tuple(f"http://a:{port}" for port in range(1, 300)))
    with pytest.raises(ConfigError, match="timeout_s"):
        StatsConfig(timeout_s=0)
