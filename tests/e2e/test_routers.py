"""Two routers at one address over a real Redis, as a user starts them; routers and Redis die."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from redis_server import RedisServer
from running_system import RunningSystem
from tiny_llama import write_checkpoint, write_pair_tokenizer

DEADLINE_S = 60.0
PROMPT = list(range(3, 60))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", vocab_size=256, max_position_embeddings=2048
    )
    write_pair_tokenizer(folder)
    return folder


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_system(tmp_path: Path, tiny_model: Path) -> Iterator[object]:
    made: list[RunningSystem] = []

    def make(*arguments: str) -> RunningSystem:
        run_dir = tmp_path / f"run-{len(made)}"
        run_dir.mkdir()
        command = ["--model", str(tiny_model), "--dtype", "float32", "--routers", "2", *arguments]
        made.append(RunningSystem(command, run_dir))
        made[-1].start()
        return made[-1]

    yield make
    for system in made:
        system.kill()


class Traffic:
    """Short requests at a steady pace, each over a connection of its own."""

    def __init__(self, system: RunningSystem) -> None:
        self._system = system
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answers: list[int | str] = []
        """HTTP status, or the kind of a broken connection."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.answers.append(ask(self._system.url))

    def wait_for(self, count: int) -> None:
        """So many more answers."""
        wanted, deadline = len(self.answers) + count, time.monotonic() + DEADLINE_S
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, "requests hang"
            time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


def ask(url: str) -> int | str:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    try:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code
    except httpx.TransportError as error:
        return type(error).__name__


def copies(system: RunningSystem) -> dict[str, tuple[str, int]]:
    """Copy -> (URL, process id)."""
    found = {}
    for file in sorted((system.run_dir / "targets").glob("*.json")):
        (group,) = json.loads(file.read_text())
        found[group["labels"]["copy"]] = (
            f"http://{group['targets'][0]}",
            int(group["labels"]["pid"]),
        )
    return found


def shared_detail(url: str) -> dict[str, object]:
    detail: dict[str, object] = httpx.get(f"{url}/health").json()["detail"]["shared_state"]
    return detail


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            if condition():
                return
        except (httpx.TransportError, KeyError):
            pass
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.1)


def test_requests_are_answered_while_a_router_and_redis_die(
    make_system: object, redis: RedisServer
) -> None:
    assert callable(make_system)
    system = make_system("--no-ray", "--redis", redis.url)
    assert set(copies(system)) == {"router-0", "router-1"}
    traffic = Traffic(system)
    try:
        # Both take their part of the connections.
        traffic.wait_for(30)
        for url, _ in copies(system).values():
            assert "baton_requests_total" in httpx.get(f"{url}/metrics").text
            assert shared_detail(url)["routers"] == 2
        assert set(traffic.answers) == {200}

        # A router is killed: what it was just answering breaks, all else goes to the other.
        url, pid = copies(system)["router-0"]
        os.kill(pid, signal.SIGKILL)
        traffic.wait_for(20)
        until(lambda: copies(system)["router-0"][1] != pid)
        until(lambda: shared_detail(copies(system)["router-0"][0])["routers"] == 2)
        broken = [answer for answer in traffic.answers if answer != 200]
        assert len(broken) <= 2 and all(isinstance(answer, str) for answer in broken)

        # Redis is killed and comes back with nothing: nobody notices but the health detail.
        num_before = len(traffic.answers)
        redis.kill()
        urls = [url for url, _ in copies(system).values()]
        until(lambda: all(shared_detail(url)["is_up"] is False for url in urls))
        traffic.wait_for(30)
        redis.start()
        until(lambda: all(shared_detail(url)["is_up"] is True for url in urls))
        until(lambda: all(shared_detail(url)["routers"] == 2 for url in urls))
        traffic.wait_for(30)
        assert set(traffic.answers[num_before:]) == {200}
    finally:
        traffic.stop()
    system.assert_nothing_leaked()
    assert system.interrupt(30) < 20
    assert system.leftovers() == []
    assert list((system.run_dir / "targets").iterdir()) == []
    with redis.client() as client:
        assert all(client.ttl(name) > 0 for name in client.scan_iter())


@pytest.mark.slow
def test_copies_on_ray_share_an_actor(make_system: object) -> None:
    assert callable(make_system)
    system = make_system()
    urls = [url for url, _ in copies(system).values()]
    assert len(urls) == 2
    until(lambda: all(shared_detail(url)["routers"] == 2 for url in urls))
    assert {shared_detail(url)["backend"] for url in urls} == {"ray"}
    assert [ask(system.url) for _ in range(10)] == [200] * 10
    assert system.interrupt(40) < 30
    assert system.leftovers() == []
