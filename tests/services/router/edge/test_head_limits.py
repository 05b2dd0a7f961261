"""Heads of requests that are too long or do not come: bounded memory and time, and a reason."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json

import pytest

GET = b"GET /health HTTP/1.1\r\nHost: edge\r\n"


@pytest.fixture
async def tight(generator, edge_config, serve_edge):
    config = dataclasses.replace(edge_config, max_head_bytes=4096, head_timeout_s=0.3)
    async with serve_edge(generator, config) as edge:
        yield edge


async def answer(reader) -> tuple[int, dict]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    body = await asyncio.wait_for(reader.read(), 5)
    return int(head.split()[1]), json.loads(body)


def rejected(edge, status: int) -> float:
    name = f'baton_requests_rejected_total{{status="{status}"}} '
    lines = edge.metrics.render().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(
    "sent",
    [GET + b"X-One: " + b"y" * 5000, GET + b"".join(b"X-%d: y\r\n" % i for i in range(600))],
    ids=["one header", "many headers"],
)
async def test_a_head_without_end_is_refused(tight, sent) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(sent)
    status, body = await answer(reader)
    assert status == 431 and "more than 4096 bytes" in body["error"]["message"]
    assert rejected(tight, 431) == 1
    writer.close()


async def test_a_flood_of_headers_is_cut_early(tight) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(GET)
    num_sent = 0
    with contextlib.suppress(ConnectionError):
        while num_sent < 50_000_000:
            writer.write(b"X-Header: " + b"y" * 10_000 + b"\r\n")
            await writer.drain()
            num_sent += 10_000
    assert num_sent < 50_000_000 and rejected(tight, 431) == 1
    writer.close()


async def test_a_head_that_does_not_come_is_given_up(tight) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(GET)
    status, body = await answer(reader)
    assert status == 408 and "within 0.3 seconds" in body["error"]["message"]
    writer.close()
    # Nothing asked, nothing answered.
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert rejected(tight, 408) == 1
    writer.close()


async def test_requests_within_bounds_are_served_one_after_the_other(tight) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    for _ in range(20):
        # In pieces, each head as long as nearly all that is allowed.
        writer.write(GET)
        await asyncio.sleep(0.005)
        writer.write(b"X-Padding: " + b"y" * 3900 + b"\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        await reader.readexactly(length)
    # An idle connection is not a head that does not come.
    await asyncio.sleep(0.4)
    writer.write(GET + b"\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_long_body_is_no_head(tight) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x" * 20_000, "max_tokens": 1}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    for start in range(0, len(body), 1000):
        writer.write(body[start : start + 1000])
        await asyncio.sleep(0.02)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    # Longer than the context, but read.
    assert head.startswith(b"HTTP/1.1 400")
    writer.close()
