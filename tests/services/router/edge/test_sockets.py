"""What happens on the wire: bytes, flushes, disconnects, slow readers, big bodies."""

from __future__ import annotations

import asyncio
import json
import socket

from baton.core.request import FinishReason
from baton.telemetry.metrics import Metrics
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.http_app import HttpApp
from services.router.openai_api.feed import BUFFERED_DELTAS
from services.router.requests.generation import GenerationDelta, Usage

CHAT = "/v1/chat/completions"


def request_bytes(body: dict | bytes, path: str = CHAT, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: edge",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def chat_bytes(**fields) -> bytes:
    return request_bytes({"messages": [{"role": "user", "content": "hi"}], **fields})


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """One chunk of a chunked response; empty at its end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def connect(edge):
    return await asyncio.open_connection("127.0.0.1", edge.port)


async def test_stream_headers_and_framing(edge):
    reader, writer = await connect(edge)
    writer.write(chat_bytes(stream=True))
    status, headers = await read_head(reader)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["transfer-encoding"] == "chunked"
    assert "content-length" not in headers
    data = b""
    while chunk := await read_chunk(reader):
        data += chunk
    assert data.endswith(b"\n\ndata: [DONE]\n\n")
    assert all(event.startswith(b"data: ") for event in data.split(b"\n\n")[:-1])
    writer.close()


async def test_every_delta_is_flushed_when_it_comes(edge):
    """Each token is read before the generator is allowed to make the next one."""
    gate = asyncio.Semaphore(0)
    original = edge.generator._deltas

    async def gated(request):
        async for delta in original(request):
            await gate.acquire()
            yield delta

    edge.generator._deltas = gated
    reader, writer = await connect(edge)
    writer.write(chat_bytes(stream=True, max_tokens=5))
    seen = b""
    gate.release()
    await read_head(reader)
    for character in "Hello":
        while b'{"content":"%b"}' % character.encode() not in seen:
            seen += await asyncio.wait_for(read_chunk(reader), 2)
        seen = b""
        gate.release()
    writer.close()


async def test_ready_deltas_leave_in_few_writes(edge):
    edge.generator.reply = lambda request: "x" * 200
    reader, writer = await connect(edge)
    writer.write(chat_bytes(stream=True))
    await read_head(reader)
    num_chunks, num_events = 0, 0
    while chunk := await read_chunk(reader):
        num_chunks += 1
        num_events += chunk.count(b'"content":"x"')
    assert num_events == 200
    assert num_chunks <= 201
    writer.close()


async def test_nagle_is_off(edge):
    _, writer = await connect(edge)
    writer.write(chat_bytes(stream=True))
    await asyncio.sleep(0.05)
    (protocol,) = edge.server._server.server_state.connections
    accepted = protocol.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()


async def test_disconnect_in_a_stream_cancels_at_once(edge):
    edge.generator.reply = lambda request: "x" * 200
    edge.generator.step_s = 0.02
    reader, writer = await connect(edge)
    writer.write(chat_bytes(stream=True))
    await read_head(reader)
    await read_chunk(reader)
    writer.transport.abort()
    await edge.generator.until_idle(1, timeout_s=0.5)
    assert edge.generator.closed_early
    assert edge.generator.num_yielded < 20
    assert edge.app.num_running == 0


async def test_disconnect_before_the_first_token_cancels_too(edge):
    edge.generator.step_s = 30
    _, writer = await connect(edge)
    writer.write(chat_bytes(stream=True, n=3))
    while len(edge.generator.started) < 3:
        await asyncio.sleep(0.005)
    writer.transport.abort()
    await edge.generator.until_idle(3, timeout_s=0.5)
    assert len(edge.generator.closed_early) == 3


async def test_disconnect_of_a_plain_request_cancels_and_harms_nobody(edge, client):
    edge.generator.step_s = 0.02
    _, writer = await connect(edge)
    writer.write(chat_bytes())
    while not edge.generator.started:
        await asyncio.sleep(0.005)
    writer.transport.abort()
    await edge.generator.until_idle(1, timeout_s=0.5)
    assert edge.generator.closed_early
    edge.generator.step_s = 0
    response = await client.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]})
    assert response.status_code == 200


async def test_half_sent_request_is_harmless(edge):
    _, writer = await connect(edge)
    writer.write(chat_bytes()[:-5])
    await asyncio.sleep(0.02)
    writer.transport.abort()
    await asyncio.sleep(0.02)
    assert not edge.generator.started


async def test_slow_reader_bounds_what_is_buffered(edge):
    """The edge stops taking deltas while the client does not read, and loses none."""
    num_deltas = 40_000

    async def endless(request):
        for _ in range(num_deltas):
            edge.generator.num_yielded += 1
            yield [GenerationDelta("y" * 32, (1,))]
        yield [GenerationDelta("", (), (), FinishReason.STOP, None, Usage(1, 1, 0))]

    edge.generator.generate = endless
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, ("127.0.0.1", edge.port))
    await loop.sock_sendall(raw, chat_bytes(stream=True))
    counts = [-1]
    while edge.generator.num_yielded == 0 or counts[-1] != edge.generator.num_yielded:
        counts.append(edge.generator.num_yielded)
        await asyncio.sleep(0.1)
    assert counts[-1] < num_deltas - BUFFERED_DELTAS
    received = 0
    tail = b""
    while b"[DONE]" not in tail:
        data = await loop.sock_recv(raw, 1 << 20)
        received += (tail[-9:] + data).count(b'"content":"y') - tail[-9:].count(b'"content":"y')
        tail = tail[-32:] + data
    raw.close()
    assert edge.generator.num_yielded == num_deltas


async def test_client_that_never_reads_is_cut(generator, serve_edge):
    async def endless(request):
        try:
            while True:
                yield [GenerationDelta("y" * 100, (1,))]
                # As a generation that waits for its workers: others get their turn.
                await asyncio.sleep(0)
        finally:
            generator.closed_early.append(request.request_id)

    generator.generate = endless
    config = EdgeConfig(stalled_client_s=1, stop_grace_s=0)
    async with serve_edge(generator, config) as edge:
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", edge.port))
            raw.sendall(chat_bytes(stream=True))
            await generator.until_idle(1, timeout_s=8)


async def test_announced_big_body_is_refused_and_the_connection_lives(edge):
    """The client sends everything before it reads, as most clients do."""
    reader, writer = await connect(edge)
    writer.write(request_bytes(b"x" * (32 << 20)))
    await writer.drain()
    status, headers = await read_head(reader)
    body = json.loads(await reader.readexactly(int(headers["content-length"])))
    assert status == 413
    assert body["error"]["code"] == "request_too_large"
    assert str(256 << 10) in body["error"]["message"]
    writer.write(chat_bytes())
    assert (await read_head(reader))[0] == 200
    writer.close()


async def test_chunked_big_body_is_refused_without_reading_it_all(edge):
    reader, writer = await connect(edge)
    writer.write(b"POST %b HTTP/1.1\r\nHost: e\r\n" % CHAT.encode())
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    for _ in range(5):
        writer.write(piece)
    status, headers = await asyncio.wait_for(read_head(reader), 2)
    assert status == 413
    await reader.readexactly(int(headers["content-length"]))
    writer.write(b"0\r\n\r\n" + chat_bytes())
    assert (await read_head(reader))[0] == 200
    writer.close()


async def test_waiting_client_gets_the_refusal_instead_of_continue(edge):
    reader, writer = await connect(edge)
    head, _ = request_bytes(b"x" * (1 << 20), CHAT, "Expect: 100-continue").split(b"\r\n\r\n", 1)
    writer.write(head + b"\r\n\r\n")
    assert (await asyncio.wait_for(read_head(reader), 2))[0] == 413
    writer.close()


async def test_http_1_0_client_is_answered(edge):
    reader, writer = await connect(edge)
    writer.write(b"GET /version HTTP/1.0\r\n\r\n")
    data = await asyncio.wait_for(reader.read(), 2)
    assert b" 200 " in data.split(b"\r\n")[0]
    writer.close()


async def test_garbage_is_a_400(edge):
    reader, writer = await connect(edge)
    writer.write(b"\x16\x03\x01\x02\x00garbage\r\n\r\n")
    data = await asyncio.wait_for(reader.read(), 2)
    assert b" 400 " in data.split(b"\r\n")[0]
    writer.close()


async def test_body_that_never_comes_ends_with_an_error(generator):
    app = HttpApp(generator, metrics=Metrics(), config=EdgeConfig(body_timeout_s=0.02))
    sent = []

    async def receive():
        await asyncio.sleep(30)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await app(scope, receive, send)
    assert sent[0]["status"] == 400
    app.close()


async def test_stop_ends_open_streams_with_an_error(edge):
    edge.generator.step_s = 0.01
    edge.generator.reply = lambda request: "x" * 250
    reader, writer = await connect(edge)
    writer.write(chat_bytes(stream=True))
    await read_head(reader)
    await read_chunk(reader)
    started_at = asyncio.get_running_loop().time()
    await edge.server.stop()
    assert asyncio.get_running_loop().time() - started_at < 2
    data = await reader.read()
    assert b'"type":"service_unavailable"' in data
    assert edge.generator.closed_early
    writer.close()


async def test_stop_lets_short_requests_finish(edge):
    edge.generator.step_s = 0.002
    reader, writer = await connect(edge)
    writer.write(chat_bytes(stream=True))
    await read_head(reader)
    await edge.server.stop()
    assert (await reader.read()).endswith(b"0\r\n\r\n")
    assert edge.generator.finished
    writer.close()
