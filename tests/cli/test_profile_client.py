"""The profile's client over real sockets: tokens counted, and answers that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from baton.cli.profile_client import Streamed, completion_body, stream_completion
from baton.core.errors import Unavailable

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(*token_ids: int) -> bytes:
    choice = {"index": 0, "text": "", "token_ids": list(token_ids), "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


async def ask(*pieces: bytes) -> tuple[Streamed, bytes]:
    """From a server that answers with `pieces` and closes; with what it was sent."""
    heard, answered = b"", asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard = await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        answered.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        port = server.sockets[0].getsockname()[1]
        body = completion_body("m", [1, 2, 3], 4)
        try:
            return await stream_completion(f"127.0.0.1:{port}", body), heard
        finally:
            await answered.wait()


def run(pieces: Sequence[bytes]) -> tuple[Streamed, bytes]:
    return asyncio.run(ask(*pieces))


def test_every_token_has_its_time_also_of_events_with_several_or_none() -> None:
    streamed, heard = run([HEAD, event(5), event(), event(6, 7) + event(8), DONE])
    assert heard.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert len(streamed.arrivals_s) == 4
    assert streamed.arrivals_s == sorted(streamed.arrivals_s)
    assert streamed.arrivals_s[1] == streamed.arrivals_s[2]
    assert 0 < streamed.ttft_s < streamed.last_s - streamed.sent_s
    mean_itl_s = streamed.mean_itl_s(4)
    assert mean_itl_s == pytest.approx((streamed.last_s - streamed.arrivals_s[0]) / 3)
    assert streamed.mean_itl_s(1) is None


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([b"HTTP/1.1 429 Too Many\r\n\r\n", b'{"error": "wait"}'], "429"),
        ([HEAD, event(5)], "cut before its end"),
        ([b"HTTP"], "does not answer"),
        ([HEAD, DONE], "cut before its end"),
        ([HEAD, event(5), b'data: {"error": {"message": "lost"}}\n\n', DONE], "lost"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(pieces: list[bytes], says: str) -> None:
    with pytest.raises(Unavailable, match=says):
        run(pieces)
