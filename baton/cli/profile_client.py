"""One streamed completion over a plain socket, with the time of every token's arrival.

Cheap enough to run beside the workers that it measures. Does not know: what is asked, when.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.errors import Unavailable

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 300.0
_TOKEN_IDS = b'"token_ids"'


@dataclass(slots=True)
class Streamed:
    """Times on the clock of `time.perf_counter`."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list)
    """Of each token; those that one event brings have one time."""

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    @property
    def last_s(self) -> float:
        return self.arrivals_s[-1]

    def mean_itl_s(self, num_tokens: int) -> float | None:
        """`num_tokens`: of the answer; None of a single one."""
        if num_tokens < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (num_tokens - 1)


def completion_body(model: str, prompt: Sequence[int], max_tokens: int) -> bytes:
    """Exactly `max_tokens` tokens, whatever the model makes of the prompt."""
    return json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # Text waits for whole characters; ids do not, and are counted.
            "return_token_ids": True,
        }
    ).encode()


async def stream_completion(address: str, body: bytes) -> Streamed:
    """Raises Unavailable when there is no answer, or it is no stream, is cut or hangs."""
    try:
        return await _stream(address, body)
    except TimeoutError:
        raise Unavailable(f"{address} did not answer within {REQUEST_TIMEOUT_S:.0f} s") from None
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Unavailable(f"{address} does not answer: {error}") from error


async def _stream(address: str, body: bytes) -> Streamed:
    host, port = address.rsplit(":", 1)
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        streamed = Streamed(time.perf_counter())
        writer.write(head + body)
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await _read(reader, streamed)
        return streamed
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader, streamed: Streamed) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        rest = await reader.read(4096)
        status = head.split(b"\r\n", 1)[0].decode(errors="replace")
        raise Unavailable(f"{status}: {rest[:300].decode(errors='replace')}")
    is_over = False
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            is_over = True
        elif line.startswith(b"data: ") and _TOKEN_IDS in line:
            streamed.arrivals_s += [time.perf_counter()] * _num_tokens(line)
        elif line.startswith(b"data: ") and b'"error"' in line:
            raise Unavailable(line[:300].decode(errors="replace"))
    if not is_over or not streamed.arrivals_s:
        raise Unavailable("the stream was cut before its end")


def _num_tokens(line: bytes) -> int:
    event = json.loads(line.removeprefix(b"data: "))
    return sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
