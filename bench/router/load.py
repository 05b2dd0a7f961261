"""Load over plain sockets: what a client sees of a router, at little cost of its own.

Closed loop: `concurrency` keep-alive connections, each with one request at a time, for a bounded
time. A request is one chat completion, whole or streamed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0

MakeBody = Callable[[int], bytes]
"""Request number -> JSON body."""


@dataclass(slots=True)
class Seen:
    """What all connections have seen. Seconds."""

    latencies_s: list[float] = field(default_factory=list)
    """From sending to the end of the answer."""
    first_s: list[float] = field(default_factory=list)
    """To the first event with content; streams only."""
    gaps_s: list[float] = field(default_factory=list)
    """Between what a stream brings at a time, one token or several, from the first on."""
    num_failed: int = 0
    wall_s: float = 0.0

    def percentile_ms(self, values: list[float], share: float) -> float:
        ordered = sorted(values)
        if not ordered:
            return float("nan")
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def chat_body(model: str, text: str, *, max_tokens: int, stream: bool = False) -> bytes:
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
    ).encode()


async def run_load(
    address: str,
    make_body: MakeBody,
    *,
    concurrency: int,
    seconds: float,
    max_requests: int | None = None,
) -> Seen:
    """Drive `address` (host:port) for `seconds`, at most `max_requests` requests."""
    seen, numbers = Seen(), iter(range(max_requests or 1 << 60))
    started_s = time.perf_counter()
    until_s = started_s + seconds
    await asyncio.gather(
        *(_connection(address, make_body, numbers, until_s, seen) for _ in range(concurrency))
    )
    seen.wall_s = time.perf_counter() - started_s
    return seen


async def _connection(
    address: str, make_body: MakeBody, numbers: Iterator[int], until_s: float, seen: Seen
) -> None:
    host, port = address.rsplit(":", 1)
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for number in numbers:
            if time.perf_counter() >= until_s:
                return
            body = make_body(number)
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode()
            sent_s = time.perf_counter()
            writer.write(head + body)
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                is_ok = await _read_answer(reader, sent_s, seen)
            seen.latencies_s.append(time.perf_counter() - sent_s)
            seen.num_failed += not is_ok
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
        seen.num_failed += 1
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader, sent_s: float, seen: Seen) -> bool:
    head = await reader.readuntil(b"\r\n\r\n")
    is_ok = head.startswith(b"HTTP/1.1 200")
    lower = head.lower()
    if b"content-length:" in lower:
        length = int(lower.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        await reader.readexactly(length)
        return is_ok
    # Chunked; the end may come in pieces.
    tail, is_first, last_s = b"", True, sent_s
    while True:
        data = await reader.read(1 << 18)
        if not data:
            raise ValueError("the stream was cut")
        now_s = time.perf_counter()
        if not is_first:
            seen.gaps_s.append(now_s - last_s)
        elif data.count(b'"content":"') > data.count(b'"content":""'):
            seen.first_s.append(now_s - sent_s)
            is_first = False
        last_s = now_s
        tail = (tail + data)[-16:]
        if tail.endswith(b"0\r\n\r\n"):
            return is_ok
