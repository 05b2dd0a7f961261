"""A server that speaks the OpenAI chat stream from a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


def content(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})


def finish(reason: str = "stop") -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})


def usage(completion_tokens: int) -> str:
    counts = {"prompt_tokens": 5, "completion_tokens": completion_tokens}
    return json.dumps({"choices": [], "usage": counts})


@dataclass
class ScriptedServer:
    """Each chat request takes the next script: events, or callables run between them."""

    url: str = ""
    scripts: list[list[str | Callable[[], None]]] = field(default_factory=list)
    status: int = 200
    models: list[str] = field(default_factory=lambda: ["tiny"])
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    """The header `authorization` of each request."""

    def will_answer(self, *texts: str, reason: str = "stop") -> None:
        events = [content(text) for text in texts]
        self.scripts.append([*events, finish(reason), usage(len(texts)), "[DONE]"])


def make_handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            server.keys.append(self.headers["authorization"])
            self._send_json(200, {"data": [{"id": name} for name in server.models]})

        def do_POST(self) -> None:
            server.keys.append(self.headers["authorization"])
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append(json.loads(body))
            if server.status != 200:
                self._send_json(server.status, {"error": {"message": "the server's words"}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for step in server.scripts.pop(0):
                if callable(step):
                    step()
                    continue
                try:
                    self.wfile.write(f"data: {step}\n\n".encode())
                    self.wfile.flush()
                except OSError:
                    return

        def _send_json(self, status: int, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(scripted))
    http.daemon_threads = True
    scripted.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield scripted
    http.shutdown()
    thread.join(10)
    http.server_close()
