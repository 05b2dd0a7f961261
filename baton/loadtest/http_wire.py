"""HTTP/1.1 on asyncio's protocols: each piece of a body with the moment at which it was read.

A generator that shares a machine with what it measures must cost little, and a time stamp taken
after parsing, queues and tasks is not when a token came. So bytes go from the socket's callback
through httptools' parser straight to whoever reads the answer, in one call. Connections are kept
alive and used again; one that the server has closed meanwhile is replaced once.

Does not know: events, JSON, what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, cast
from urllib.parse import urlsplit

import httptools

from baton.core.errors import InvalidRequest

MAX_IDLE = 4096
MAX_HEADER_BYTES = 64 << 10


class Receiver(Protocol):
    """Takes one response. Called from the socket's callback; must not block."""

    def on_status(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Names of `headers` are in lower case."""
        ...

    def on_body(self, at_s: float, piece: bytes) -> None: ...


class Address(NamedTuple):
    host: str
    port: int
    tls: ssl.SSLContext | None
    authority: str
    """For the Host header."""
    path: str
    """What comes before the API's own paths; no slash at its end."""


def parse_url(url: str, ca_file: str | None = None) -> Address:
    """Raises InvalidRequest for what is not the address of an HTTP server."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InvalidRequest(f"{url!r} is no address of a server: {error}") from None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise InvalidRequest(f"{url!r} is no address of a server, such as http://127.0.0.1:8000")
    tls: ssl.SSLContext | None = None
    if parts.scheme == "https":
        try:
            tls = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise InvalidRequest(f"cannot use the CA file {ca_file}: {error}") from None
    authority = parts.netloc.rpartition("@")[2]
    # People paste the base URL that OpenAI's clients take.
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Address(parts.hostname, port, tls, authority, path)


class BrokenConnection(Exception):
    """It ended before the response did."""

    def __init__(self, message: str, *, had_answer: bool) -> None:
        super().__init__(message)
        self.had_answer = had_answer
        """Some of the response had come."""


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._parser: httptools.HttpResponseParser | None = None
        self._receiver: Receiver | None = None
        self._headers: dict[bytes, bytes] = {}
        self._done: asyncio.Future[None] | None = None
        self._at_s = 0.0
        self._had_answer = False
        self._num_header_bytes = 0
        self._transport: asyncio.Transport | None = None
        self.is_open = False
        """Another request may be sent on it."""

    async def exchange(self, request: bytes, receiver: Receiver) -> float:
        """Send and wait for the end of the response; returns when that was read.

        Raises BrokenConnection; ValueError for what is not HTTP.
        """
        if self._transport is None or not self.is_open:
            raise BrokenConnection("the server closed the connection", had_answer=False)
        self._parser = httptools.HttpResponseParser(self)
        self._receiver, self._headers, self._had_answer = receiver, {}, False
        self._num_header_bytes = 0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
            return self._at_s
        except BaseException:
            self.close()
            raise
        finally:
            self._parser = self._receiver = self._done = None

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            # At once: a request that was given up on must not go on being answered.
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._at_s = self._now()
        if self._parser is None:
            # Nothing was asked: whatever it is, the connection is of no more use.
            self.close()
            return
        self._had_answer = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(ValueError(f"not an HTTP response: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._done is None or self._done.done():
            return
        if self._had_answer and self._ends_with_connection():
            self._finish(None)
            return
        why = f": {exc}" if exc is not None else ""
        message = f"the server closed the connection{why}"
        self._finish(BrokenConnection(message, had_answer=self._had_answer))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_header_bytes += len(name) + len(value)
        if self._num_header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"more than {MAX_HEADER_BYTES} bytes of headers")
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None and self._receiver is not None
        self._receiver.on_status(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        assert self._receiver is not None
        self._receiver.on_body(self._at_s, body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if not self._parser.should_keep_alive():
            self.is_open = False
        self._finish(None)

    def _ends_with_connection(self) -> bool:
        """A body without a length lasts as long as its connection."""
        framed = b"content-length" in self._headers or b"transfer-encoding" in self._headers
        return bool(self._headers) and not framed

    def _finish(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self.is_open = False
            self._done.set_exception(error)


class Pool:
    """Connections to one server. The newest idle one is used first, so a server's idle limit
    meets the others."""

    def __init__(self, address: Address, now: Callable[[], float]) -> None:
        self._address = address
        self._now = now
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    async def exchange(
        self, request: bytes, receiver: Receiver, on_connected: Callable[[float], None]
    ) -> float:
        """As `Connection.exchange`; raises OSError also, when no connection comes about."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                self._all.discard(connection)
                continue
            try:
                return await self._run(connection, request, receiver)
            except BrokenConnection as error:
                if error.had_answer:
                    raise
                # It was closed while idle; others of its age may be too.
        connection = await self._connect()
        on_connected(self._now())
        return await self._run(connection, request, receiver)

    async def _run(self, connection: Connection, request: bytes, receiver: Receiver) -> float:
        try:
            return await connection.exchange(request, receiver)
        finally:
            if connection.is_open and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
                self._all.discard(connection)

    async def _connect(self) -> Connection:
        address = self._address
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._now), address.host, address.port, ssl=address.tls
        )
        self._all.add(connection)
        return connection

    async def aclose(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()
        # The transports close in the loop's next round.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


def request_bytes(
    method: str, address: Address, path: str, headers: Iterable[tuple[str, str]], body: bytes
) -> bytes:
    """A whole request."""
    lines = [f"{method} {address.path}{path} HTTP/1.1", f"Host: {address.authority}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
