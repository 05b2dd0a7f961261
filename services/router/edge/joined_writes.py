"""uvicorn's HTTP protocol over a connection that sends a response's head with what follows it.

uvicorn writes head and body apart, which are two system calls, two packets and two wake-ups of the
client. Here the head waits for the next write, at most until the loop's turn ends.

Does not know: requests, routes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD = b"HTTP/1.1 "
"""What a response begins with, and no chunk. A body that does so is only written a moment later."""


class JoinedTransport:
    """`transport` but for `write`."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._pass_on(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._pass_on(head)

    def _pass_on(self, data: bytes) -> None:
        # A reset by the client closes the transport before the protocol hears of it, and uvloop's
        # raises when written to then.
        if not self._transport.is_closing():
            self._transport.write(data)


class JoinedHttpProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedTransport(transport))  # type: ignore[arg-type]
