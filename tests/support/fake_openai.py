"""A server with OpenAI's HTTP API whose answers, delays and faults are scripted.

A word of a prompt is a token. Each generation is one word per token, streamed a token a chunk.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

OVERHEAD = 7
"""Tokens of a chat beyond its words."""


class Fault(Enum):
    NONE = "none"
    REFUSE = "refuse"
    CUT = "cut"
    """The connection breaks in the middle of a stream."""
    DROP = "drop"
    """It breaks before anything is answered."""
    ERROR_EVENT = "error_event"
    GARBAGE_EVENT = "garbage_event"
    NOT_HTTP = "not_http"
    HANG = "hang"
    NO_STREAM = "no_stream"
    NO_USAGE = "no_usage"


@dataclass
class FakeOpenAi:
    """`fault_of`: by number of the generation, from 0."""

    model: str = "fake"
    first_s: float = 0.0
    gap_s: float = 0.0
    cached_tokens: int = 0
    tokens_per_word: int = 1
    fault_of: Callable[[int], Fault] = lambda number: Fault.NONE
    closes: bool = False
    """Every connection after one answer."""
    not_yet: int = 0
    """Questions for models that find none."""
    requests: list[Mapping[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    max_at_a_time: int = 0
    num_connections: int = 0
    port: int = 0
    tls: ssl.SSLContext | None = None
    _at_a_time: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {
                    name.lower(): value
                    for name, _, value in (line.partition(": ") for line in head[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if not await self._answer(head[0], headers, body, writer) or self.closes:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, line: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        if line.startswith("GET"):
            cards = [] if self.not_yet else [{"id": self.model}]
            self.not_yet = max(0, self.not_yet - 1)
            _whole(writer, 200, {"data": cards})
            return True
        fault = self.fault_of(len(self.requests))
        request = json.loads(body)
        self.requests.append(request)
        self.headers.append(headers)
        self._at_a_time += 1
        self.max_at_a_time = max(self.max_at_a_time, self._at_a_time)
        try:
            return await self._generate(request, fault, writer)
        finally:
            self._at_a_time -= 1

    async def _generate(
        self, request: Mapping[str, Any], fault: Fault, writer: asyncio.StreamWriter
    ) -> bool:
        if fault is Fault.REFUSE:
            _whole(writer, 429, {"error": {"message": "too many <b>requests</b>"}})
            return True
        if fault is Fault.NOT_HTTP:
            writer.write(b"220 mail is here\r\n\r\n")
            return False
        if fault is Fault.DROP:
            return False
        await asyncio.sleep(60 if fault is Fault.HANG else self.first_s)
        usage = self._usage(request)
        if not request["stream"] or fault is Fault.NO_STREAM:
            said = "message" if "messages" in request else None
            text = " ".join(["word"] * request["max_tokens"])
            choice = {said: {"content": text}} if said else {"text": text}
            answer = {"choices": [{**choice, "finish_reason": "length"}], "usage": usage}
            _whole(writer, 200, answer)
            return True
        return await self._stream(request, fault, usage, writer)

    async def _stream(
        self,
        request: Mapping[str, Any],
        fault: Fault,
        usage: Mapping[str, object],
        writer: asyncio.StreamWriter,
    ) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        is_chat = "messages" in request
        if is_chat:
            _event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(request["max_tokens"]):
            if number:
                await asyncio.sleep(self.gap_s)
            if number == 2 and fault is Fault.CUT:
                return False
            if number == 2 and fault is Fault.ERROR_EVENT:
                _event(writer, {"error": {"message": "the worker was lost", "code": "lost"}})
                break
            if number == 2 and fault is Fault.GARBAGE_EVENT:
                _raw_event(writer, b"data: {not json\n\n")
            text = "word " if number else "first "
            choice = {"delta": {"content": text}} if is_chat else {"text": text}
            _event(writer, {"choices": [choice]})
        else:
            _event(writer, {"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
            if fault is not Fault.NO_USAGE:
                _event(writer, {"choices": [], "usage": usage})
            _raw_event(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _usage(self, request: Mapping[str, Any]) -> dict[str, object]:
        if "messages" in request:
            text = " ".join(m["content"] for m in request["messages"])
            num_prompt = OVERHEAD + len(text.split()) * self.tokens_per_word
        elif isinstance(request["prompt"], str):
            num_prompt = len(request["prompt"].split()) * self.tokens_per_word
        else:
            num_prompt = len(request["prompt"])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": request["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _whole(writer: asyncio.StreamWriter, status: int, content: object) -> None:
    body = json.dumps(content).encode()
    writer.write(
        b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (status, len(body), body)
    )


def _event(writer: asyncio.StreamWriter, content: object) -> None:
    _raw_event(writer, b"data: " + json.dumps(content).encode() + b"\n\n")


def _raw_event(writer: asyncio.StreamWriter, event: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(event), event))


@contextmanager
def running(fake: FakeOpenAi) -> Iterator[FakeOpenAi]:
    """On a loop of its own, for tests that start programs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(fake.start(), loop).result(10)
        yield fake
        loop.call_soon_threadsafe(server.close)
    finally:
        asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _end_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
