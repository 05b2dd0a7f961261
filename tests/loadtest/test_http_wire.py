"""Connections: used again, replaced when closed, bounded, in plain text and TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from baton.core.errors import InvalidRequest, Unavailable
from baton.loadtest.generator_watch import RunClock
from baton.loadtest.http_wire import (
    MAX_HEADER_BYTES,
    BrokenConnection,
    Pool,
    parse_url,
    request_bytes,
)
from baton.loadtest.openai_target import HttpOptions, OpenAiTarget
from certificates import make_certificates
from fake_openai import FakeOpenAi

Answer = Callable[[asyncio.StreamWriter], Awaitable[bool]]
"""Writes one response; False closes the connection."""


class Kept:
    """A receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.times: list[float] = []

    def on_status(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status

    def on_body(self, at_s: float, piece: bytes) -> None:
        self.times.append(at_s)
        self.body += piece


class Raw:
    """A server that answers bytes."""

    def __init__(self, *answers: bytes | None) -> None:
        """None closes the connection instead of an answer."""
        self._answers = list(answers)
        self.num_connections = 0
        self.pool: Pool

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                answer = self._answers.pop(0)
                if answer is None:
                    return
                writer.write(answer)
                if b"Content-Length" not in answer and b"chunked" not in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def get(self) -> Kept:
        kept = Kept()
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        async with asyncio.timeout(5):
            await self.pool.exchange(request, kept, lambda at_s: None)
        return kept


@pytest.fixture
async def serving() -> AsyncIterator[Callable[..., Awaitable[Raw]]]:
    servers, pools = [], []

    async def serve(*answers: bytes | None) -> Raw:
        raw = Raw(*answers)
        server = await asyncio.start_server(raw.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        raw.pool = Pool(parse_url(f"http://127.0.0.1:{port}"), RunClock())
        servers.append(server)
        pools.append(raw.pool)
        return raw

    yield serve
    for pool in pools:
        await pool.aclose()
    for server in servers:
        server.close()
    await asyncio.sleep(0.05)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


async def test_a_connection_serves_one_request_after_the_other(
    serving: Callable[..., Awaitable[Raw]],
) -> None:
    raw = await serving(OK, OK, OK)
    assert [(await raw.get()).body for _ in range(3)] == [b"hi"] * 3
    assert raw.num_connections == 1


async def test_one_that_was_closed_while_idle_is_replaced_once(
    serving: Callable[..., Awaitable[Raw]],
) -> None:
    raw = await serving(OK, None, OK)
    await raw.get()
    assert (await raw.get()).body == b"hi"
    assert raw.num_connections == 2


async def test_a_fresh_connection_that_breaks_is_an_error(
    serving: Callable[..., Awaitable[Raw]],
) -> None:
    raw = await serving(None)
    with pytest.raises(BrokenConnection) as broken:
        await raw.get()
    assert not broken.value.had_answer


async def test_bodies_of_every_framing(serving: Callable[..., Awaitable[Raw]]) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"
    until_end = b"HTTP/1.0 200 OK\r\nContent-Type: x\r\n\r\nall of it"
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"
    raw = await serving(chunked, closing, until_end, OK)
    assert [(await raw.get()).body for _ in range(4)] == [b"abc", b"hi", b"all of it", b"hi"]
    assert raw.num_connections == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: "
        + b"x" * (MAX_HEADER_BYTES + 10)
        + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
)
async def test_what_is_no_http_is_refused(
    serving: Callable[..., Awaitable[Raw]], answer: bytes
) -> None:
    raw = await serving(answer)
    with pytest.raises(ValueError, match="not an HTTP response"):
        await raw.get()


async def test_a_cut_body_is_a_broken_connection(
    serving: Callable[..., Awaitable[Raw]],
) -> None:
    raw = await serving(
        b"HTTP/1.1 200 OK\r\nX-Content-Length: no\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"
    )
    pending = asyncio.create_task(raw.get())
    await asyncio.sleep(0.1)
    assert not pending.done()
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending
    # Given up: it is not used again.
    assert raw.pool._idle == []


async def test_tls_is_spoken_and_checked(tmp_path: Path) -> None:
    folder = make_certificates(tmp_path / "certs", "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "router.pem", folder / "router-key.pem")
    fake = FakeOpenAi(tls=context)
    server = await fake.start()
    url = f"https://localhost:{fake.port}"
    good = OpenAiTarget(HttpOptions(url, ca_file=str(folder / "ca.pem")), RunClock())
    assert await good.model_names() == ["fake"]
    await good.aclose()
    stranger = OpenAiTarget(HttpOptions(url), RunClock())
    with pytest.raises(Unavailable, match="certificate"):
        await stranger.model_names()
    await stranger.aclose()
    server.close()
    await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://a", "a", 80, ""),
        ("http://a:81/v1/", "a", 81, ""),
        ("https://[::1]:5/base/v1", "::1", 5, "/base"),
        ("https://a/x", "a", 443, "/x"),
    ],
)
def test_addresses_and_base_urls(url: str, host: str, port: int, path: str) -> None:
    address = parse_url(url)
    assert (address.host, address.port, address.path) == (host, port, path)
    line = request_bytes("GET", address, "/v1/models", (), b"").split(b"\r\n")[0]
    assert line == f"GET {path}/v1/models HTTP/1.1".encode()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:80",
        "ftp://a",
        "http://",
        "http://a:b",
        "http://[",
        "http://a/x y",
        "http://a/\n",
    ],
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(InvalidRequest, match="no address of a server"):
        parse_url(url)
