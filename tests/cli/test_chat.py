"""`baton chat` against a scripted server."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest

from baton.cli.main import main


def run_interactive(monkeypatch: pytest.MonkeyPatch, lines: Iterable[str], *arguments: str) -> int:
    """Types `lines`, then ends the input."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    return main(["chat", *arguments])


def roles(request: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in request["messages"]]


def test_once_prints_the_answer_and_its_speed(
    server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.will_answer("Hel", "lo ", "wörld")
    arguments = ["--max-tokens", "7", "--temperature", "0", "--system", "be brief"]
    assert main(["chat", "--url", server.url, "--once", "hi", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == "Hello wörld\n"
    assert "first token after" in printed.err
    assert "tokens/s, 3 tokens, prompt of 5\n" in printed.err
    request = server.requests[0]
    assert roles(request) == [("system", "be brief"), ("user", "hi")]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("tiny", 7, 0)
    assert request["stream"]
    assert request["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("arguments", "environ", "sent"),
    [
        ([], {}, None),
        ([], {"OPENAI_API_KEY": "theirs"}, "Bearer theirs"),
        (["--api-key", "mine"], {"OPENAI_API_KEY": "theirs"}, "Bearer mine"),
    ],
)
def test_key_is_sent_with_every_request(
    server: Any, arguments: list[str], environ: dict[str, str], sent: str | None
) -> None:
    server.will_answer("a")
    assert main(["chat", "--url", server.url, "--once", "hi", *arguments], environ) == 0
    assert server.keys == [sent, sent]


def test_history_is_kept_until_reset(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ("one", "two", "three"):
        server.will_answer(answer)
    lines = ["first", "", "second", "/reset", "third", "/exit", "never sent"]
    assert run_interactive(monkeypatch, lines, "--url", server.url, "--model", "named") == 0
    assert [roles(request) for request in server.requests] == [
        [("user", "first")],
        [("user", "first"), ("assistant", "one"), ("user", "second")],
        [("user", "third")],
    ]
    assert {request["model"] for request in server.requests} == {"named"}


def test_end_of_input_ends_the_chat(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_interactive(monkeypatch, [], "--url", server.url) == 0


def test_interrupt_ends_the_answer_and_keeps_what_came(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = threading.Event()
    write = sys.stdout.write

    def watched(text: str) -> int:
        if "half" in text:
            printed.set()
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", watched)
    interrupt = [lambda: printed.wait(10), lambda: os.kill(os.getpid(), signal.SIGINT)]
    half = json.dumps({"choices": [{"index": 0, "delta": {"content": "half"}}]})
    server.scripts.append([half, *interrupt, lambda: time.sleep(2)])
    server.will_answer("whole")
    assert run_interactive(monkeypatch, ["a", "b"], "--url", server.url) == 0
    assert roles(server.requests[1]) == [("user", "a"), ("assistant", "half"), ("user", "b")]
    assert "stopped" in capsys.readouterr().err


def test_failed_question_is_forgotten(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = json.dumps({"error": {"message": "worker lost"}})
    server.scripts.append([error])
    server.will_answer("fine")
    assert run_interactive(monkeypatch, ["a", "b", "/what"], "--url", server.url) == 0
    assert roles(server.requests[1]) == [("user", "b")]
    printed = capsys.readouterr().err
    assert "error: the answer broke off: worker lost" in printed
    assert "unknown command /what" in printed


def test_stream_without_its_end_is_an_error(
    server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.scripts.append([])
    assert main(["chat", "--url", server.url, "--once", "hi"]) == 2
    assert "closed the stream before its end" in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_words_of_the_server_are_shown(
    server: Any, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = status
    assert main(["chat", "--url", server.url, "--once", "hi"]) == 2
    assert f"the server answered {status}: the server's words" in capsys.readouterr().err


def test_cut_answer_says_so(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.will_answer("a", reason="length")
    assert main(["chat", "--url", server.url, "--once", "hi"]) == 0
    assert "cut at --max-tokens" in capsys.readouterr().err


def test_unreachable_server_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9", "--once", "hi"]) == 2
    assert "start the server with `make serve`" in capsys.readouterr().err


def test_silent_server_is_given_up_on(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.scripts.append([lambda: time.sleep(1.0)])
    assert main(["chat", "--url", server.url, "--once", "hi", "--timeout", "0.2"]) == 2
    assert "was silent for 0.2 s" in capsys.readouterr().err


def test_server_without_models_is_told(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.models = []
    assert main(["chat", "--url", server.url, "--once", "hi"]) == 2
    assert "serves no model yet" in capsys.readouterr().err


def test_url_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "ftp://x", "--once", "hi"]) == 2
    assert "is not an http URL" in capsys.readouterr().err
