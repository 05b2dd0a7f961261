"""`baton probe` and `baton drain` of routers and Ray nodes, against a server that answers so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from baton.cli import main as cli
from baton.cli import probe


class Answers:
    """Path -> answers in turn, the last one for ever; what was asked."""

    def __init__(self) -> None:
        self.by_path: dict[str, list[tuple[int, str]]] = {}
        self.asked: list[str] = []
        self.url = ""


@pytest.fixture
def answers() -> Iterator[Answers]:
    scripted = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scripted.asked.append(self.path)
            answers = scripted.by_path.get(self.path, [(404, "no such path")])
            status, text = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        scripted.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield scripted
        server.shutdown()
        thread.join()


def test_a_router_is_live_though_not_ready(
    answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.by_path = {"/version": [(200, "{}")], "/health": [(503, "no worker answers")]}
    assert cli.main(["probe", "router", "live", "--url", answers.url], {}) == 0
    assert cli.main(["probe", "router", "ready", "--url", answers.url], {}) == 1
    assert "no worker answers" in capsys.readouterr().err
    assert answers.asked == ["/version", "/health"]


def test_a_ray_node_answers_for_itself(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    path = probe.RAYLET_URL.removeprefix("http://127.0.0.1:52365")
    monkeypatch.setattr(probe, "RAYLET_URL", answers.url + path)
    answers.by_path = {path: [(200, "success")]}
    assert cli.main(["probe", "ray", "live"], {}) == 0
    answers.by_path = {path: [(503, "")]}
    assert cli.main(["probe", "ray", "live"], {}) == 1


@pytest.mark.parametrize("what", ["router", "drain"])
def test_a_process_that_has_ended_is_not_live(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:9"
    command = (
        ["probe", "router", "live", "--url", url]
        if what == "router"
        else ["drain", "--router", url]
    )
    assert cli.main(command, {}) == 1
    assert url in capsys.readouterr().err


def _running(count: float) -> tuple[int, str]:
    return 200, f"# HELP baton_requests_running x\nbaton_requests_running {count}\nother 7\n"


def test_drain_waits_until_the_router_is_idle(
    answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.cli import drain

    monkeypatch.setattr(drain, "POLL_S", 0.01)
    answers.by_path = {"/metrics": [_running(2.0), _running(1.0), _running(0.0)]}
    assert cli.main(["drain", "--router", answers.url, "--delay", "0.01"], {}) == 0
    assert answers.asked == ["/metrics"] * 3
    answers.by_path = {"/metrics": [_running(2.0)]}
    assert cli.main(["drain", "--router", answers.url, "--timeout", "0.05"], {}) == 1
    assert "2 requests still run" in capsys.readouterr().out
