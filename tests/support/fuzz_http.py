"""Bytes that are nearly HTTP, sent to a socket in pieces, and the statuses that come back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import struct

from fuzzing import TOKENS, mutate

_HELLO = [{"role": "user", "content": "hi"}]
_SHORT = {"model": "tiny", "max_tokens": 4}
_BODIES = {
    "/v1/chat/completions": [
        {**_SHORT, "messages": _HELLO},
        {**_SHORT, "messages": _HELLO, "stream": True, "stream_options": {"include_usage": True}},
        {**_SHORT, "messages": _HELLO, "n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1},
        {
            **_SHORT,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "required",
        },
    ],
    "/v1/completions": [
        {**_SHORT, "prompt": "abc", "stop": ["zz"], "temperature": 0.5},
        {**_SHORT, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 1, "stream": True},
        {**_SHORT, "prompt": "a", "guided_regex": "[a-z]{1,4}", "logit_bias": {"5": 3.5}},
        {**_SHORT, "prompt": "a", "response_format": {"type": "json_object"}, "prompt_logprobs": 1},
    ],
    "/tokenize": [{"prompt": "abc", "return_token_strs": True}, {"messages": _HELLO}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
    "/v1/responses": [{"model": "tiny", "input": "hi", "max_output_tokens": 4}],
    "/v1/messages": [{**_SHORT, "messages": _HELLO}],
    "/v1/embeddings": [{"model": "tiny", "input": "hi"}],
}
_PATHS = (
    "/health", "/ping", "/load", "/version", "/metrics", "/openapi.json", "/v1/models", "/ui",
    "/v1/models/tiny", "/pool_stats", "/nowhere", "/v1/responses/resp_1",
)  # fmt: skip
_STATUS = re.compile(rb"(?:\A|\r\n)HTTP/1\.1 (\d{3})[ \r]")

IDLE_S = 1.0
"""Without a byte of an answer; what was sent was not a whole request then."""


def _request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: edge", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _chunked(path: str, body: bytes) -> bytes:
    head = _request("POST", path, b"", "Transfer-Encoding: chunked")
    half = len(body) // 2
    pieces = (body[:half], body[half:], b"")
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


POSTS = [(path, json.dumps(body).encode()) for path, many in _BODIES.items() for body in many]
REQUESTS = [
    *(_request("POST", path, body) for path, body in POSTS),
    *(_request("GET", path) for path in _PATHS),
    *(_chunked(path, body) for path, body in POSTS[:3]),
    _request("POST", *POSTS[0], "Expect: 100-continue", "X-Request-Id: a", "X-Slo-Class: batch"),
]


def draw(rng: random.Random) -> bytes:
    """One connection's worth: mutated bodies in right heads, or mutated in any place."""
    if rng.random() < 0.5:
        path, body = rng.choice(POSTS)
        data = _request("POST", path, mutate(body, rng, [body for _, body in POSTS]))
    else:
        data = mutate(rng.choice(REQUESTS), rng, REQUESTS)
    if rng.random() < 0.1:
        data += rng.choice(REQUESTS)
    if rng.random() < 0.02:
        data = rng.choice(TOKENS) * rng.choice((1, 100, 20_000))
    return data


async def exchange(
    host: str, port: int, data: bytes, rng: random.Random, *, idle_s: float = IDLE_S
) -> list[int]:
    """Statuses of the answers; in one case of ten the client leaves at some point instead."""
    reader, writer = await asyncio.open_connection(host, port)
    leaves = rng.random() < 0.1
    answer = bytearray()
    try:
        with contextlib.suppress(ConnectionError):
            cut = rng.randrange(len(data) + 1) if rng.random() < 0.3 else len(data)
            for piece in (data[:cut], data[cut:]):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(rng.choice((0, 0, 0.01)) if piece else 0)
            while not leaves:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(idle_s):
                        more = await reader.read(65536)
                        answer += more
                        if more:
                            continue
                break
    finally:
        if leaves and rng.random() < 0.5:
            # A reset instead of an orderly end.
            linger = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                opened = writer.get_extra_info("socket")
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return [int(status) for status in _STATUS.findall(answer)]


def wrong(statuses: list[int], data: bytes) -> str | None:
    """501 and 503 are answers that the API's description has."""
    bad = [status for status in statuses if status >= 500 and status not in (501, 503)]
    return f"{bad} for {data[:2000]!r}" if bad else None
