"""Bounds on a request's head: bytes, and seconds until it is whole.

uvicorn keeps whatever a client sends as headers, for as long as it takes. A head that is too long
gets 431, one that does not come 408, and the connection is cut.

Does not know: bodies, which have bounds of their own (`openai_api.exchange`), routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import orjson

from services.router.edge.edge_config import EdgeConfig
from services.router.edge.joined_writes import JoinedHttpProtocol

_PHRASES = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


def limited_protocol(
    config: EdgeConfig, on_refused: Callable[[int], None]
) -> type[JoinedHttpProtocol]:
    """For `uvicorn.Config(http=...)`. `on_refused` is told the status of every head turned away."""

    class LimitedHttpProtocol(JoinedHttpProtocol):
        _in_head = True
        _num_head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._in_head:
                super().data_received(data)
                return
            self._num_head_bytes += len(data)
            super().data_received(data)
            if not self._num_head_bytes or self.transport.is_closing():
                # The head is whole.
                return
            if self._num_head_bytes > config.max_head_bytes:
                self._refuse(431, f"the head has more than {config.max_head_bytes} bytes")
            elif self._head_timer is None:
                # Most heads come whole, and need no timer.
                self._start_timer()

        def on_headers_complete(self) -> None:
            self._stop_timer()
            self._in_head, self._num_head_bytes = False, 0
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head = True
            super().on_message_complete()

        def _start_timer(self) -> None:
            self._head_timer = self.loop.call_later(config.head_timeout_s, self._expire)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _expire(self) -> None:
            self._head_timer = None
            if self.transport.is_closing():
                return
            if not self._num_head_bytes:
                # Nobody asked anything, so nobody is answered.
                self.transport.close()
                return
            self._refuse(408, f"the head did not arrive within {config.head_timeout_s:g} seconds")

        def _refuse(self, status: int, message: str) -> None:
            self._stop_timer()
            on_refused(status)
            error = {"message": message, "type": "invalid_request_error", "param": None}
            body = orjson.dumps({"error": {**error, "code": None}})
            head = (
                f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return LimitedHttpProtocol
