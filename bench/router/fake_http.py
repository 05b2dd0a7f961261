"""The same made-up worker for routers that speak HTTP to theirs: OpenAI chat over plain sockets.

    python -m bench.router.fake_http [--step-ms 5] [--max-tokens-cap N]

Prints `ready HOST:PORT` and serves until its standard input closes. Answers a body whole or as
server-sent events, one token each, all streams stepping together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import cast

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n"
_USAGE = b'"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}'
_CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"%b",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":%b}]}\n\n'
)
_ANSWER = (
    b'{"id":"c","object":"chat.completion","created":1,"model":"%b","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":" token"},"finish_reason":"length"}],'
    b'"kv_transfer_params":{"remote_block_ids":[[0]],"remote_engine_id":"e",'
    b'"remote_host":"127.0.0.1","remote_port":1},' + _USAGE + b"}"
)


class FakeHttp(asyncio.Protocol):
    """One keep-alive connection; requests on it come one after the other."""

    def __init__(self, stepper: Stepper, model: bytes, cap: int) -> None:
        self._stepper, self._model, self._cap = stepper, model, cap
        self._data = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stepper.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, rest = self._data.partition(b"\r\n\r\n")
        if not separator:
            return
        length = _content_length(head)
        if len(rest) < length:
            return
        body, self._data = rest[:length], rest[length:]
        self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET") or b"/chat/completions " not in head.split(b"\r\n", 1)[0]:
            found = head.startswith(b"GET")
            content = b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % self._model
            status = b"200 OK" if found else b"404 Not Found"
            self.transport.write(
                b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (status, len(content), content)
            )
            return
        request = json.loads(body)
        wanted = request.get("max_tokens") or request.get("max_completion_tokens") or 1
        num_tokens = min(wanted, self._cap)
        if request.get("stream"):
            self.transport.write(
                _HEAD % b"text/event-stream" + b"Transfer-Encoding: chunked\r\n\r\n"
            )
            self._stepper.streams[self] = num_tokens
            self._stepper.advance(self)
        else:
            answer = _ANSWER % (self._model, num_tokens, num_tokens + 1)
            self.transport.write(
                _HEAD % b"application/json" + b"Content-Length: %d\r\n\r\n" % len(answer) + answer
            )

    def token(self, *, is_last: bool) -> None:
        chunk = _CHUNK % (self._model, b'"length"' if is_last else b"null")
        if is_last:
            chunk += b"data: [DONE]\n\n"
        end = b"0\r\n\r\n" if is_last else b""
        self.transport.write(b"%x\r\n%b\r\n%b" % (len(chunk), chunk, end))


class Stepper:
    """Gives every stream one token per step."""

    def __init__(self, step_s: float) -> None:
        self.streams: dict[FakeHttp, int] = {}
        self._step_s = step_s

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            next_s = max(loop.time(), next_s + self._step_s)
            await asyncio.sleep(next_s - loop.time())
            for stream in list(self.streams):
                self.advance(stream)

    def advance(self, stream: FakeHttp) -> None:
        left = self.streams[stream] = self.streams[stream] - 1
        if left <= 0:
            del self.streams[stream]
        stream.token(is_last=left <= 0)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _serve(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stepper = Stepper(args.step_ms / 1000)
    stepping = loop.create_task(stepper.run())
    server = await loop.create_server(
        lambda: FakeHttp(stepper, args.model.encode(), args.max_tokens_cap), "127.0.0.1", 0
    )
    host, port = server.sockets[0].getsockname()
    print(f"ready {host}:{port}", flush=True)
    closed = loop.create_future()
    loop.add_reader(sys.stdin, lambda: sys.stdin.read(1) or closed.done() or closed.set_result(0))
    await closed
    stepping.cancel()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--max-tokens-cap", type=int, default=1 << 30, help="1 plays a prefill")
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
