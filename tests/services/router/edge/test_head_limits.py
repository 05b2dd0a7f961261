"""Heads of requests that are too long or do not come: bounded memory and time, and a reason."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json

import pytest

GET = b"GET /health HTTP/1.1\r\nHost: edge\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\n"


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


@pytest.mark.parametrize("sent", [b"X-Trailer: y\r\n" * 1000, b"y" * 10_000], ids=["many", "one"])
async def test_trailers_of_a_body_are_bounded_too(tight, sent) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
    await asyncio.sleep(0.05)
    writer.write(b"0\r\nX-First: ")
    num_sent = 0
    with contextlib.suppress(ConnectionError):
        while num_sent < 20_000_000:
            writer.write(sent)
            await writer.drain()
            num_sent += len(sent)
    assert num_sent < 20_000_000 and rejected(tight, 431) == 1
    writer.close()


async def test_a_body_in_the_smallest_pieces_is_read(tight) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x" * 3000, "max_tokens": 1}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    for byte in body:
        writer.write(b"1\r\n%c\r\n" % byte)
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(b"0\r\n\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 400")
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
    writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body))
    for start in range(0, len(body), 1000):
        writer.write(body[start : start + 1000])
        await asyncio.sleep(0.02)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    # Longer than the context, but read.
    assert head.startswith(b"HTTP/1.1 400")
    writer.close()


@pytest.mark.parametrize("step_s", [0.05, 0.5], ids=["amid the answer", "before it"])
async def test_a_stray_line_end_does_not_cut_the_answer(tight, generator, step_s) -> None:
    generator.step_s = step_s
    max_tokens = round(0.6 / step_s)
    body = json.dumps(
        {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": max_tokens}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    await asyncio.sleep(0.1)
    # As some clients send it behind a body; the rest of the answer takes longer than a head may.
    writer.write(b"\r\n")
    rest = await asyncio.wait_for(reader.read(), 10)
    end = rest.index(b"data: [DONE]")
    assert rest.startswith(b"HTTP/1.1 200") and b"408" not in rest[:end]
    writer.close()


async def test_a_head_too_long_is_no_part_of_the_answer_before_it(tight, generator) -> None:
    generator.step_s = 0.05
    body = json.dumps({"model": "tiny", "prompt": "x" * 20, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.write(GET + b"X-One: " + b"y" * 5000)
    rest = await asyncio.wait_for(reader.read(), 10)
    assert b"431" not in rest and rejected(tight, 431) == 1
    writer.close()
