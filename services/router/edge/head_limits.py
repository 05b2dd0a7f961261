"""Bounds on a request's head: bytes, and seconds until it is whole; the same bytes for trailers.

uvicorn keeps whatever a client sends as headers, for as long as it takes, and as trailers behind a
body. What is too long gets 431, a head that does not come 408, and the connection is cut.

Does not know: bodies, which have bounds of their own (`openai_api.exchange`), routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import orjson

from services.router.edge.edge_config import EdgeConfig
from services.router.edge.joined_writes import JoinedHttpProtocol

_PHRASES = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class LimitedHttpProtocol(JoinedHttpProtocol):
    """What `limited_protocol` binds to settings."""

    limits: EdgeConfig
    count_refused: Callable[[int], None]
    """Told the status of every head turned away."""
    _in_head = True
    _num_head_bytes = 0
    _num_idle_bytes = 0
    """Received after the head since the last that were part of the body: chunk marks, trailers."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_head:
            self._receive_body(data)
            return
        self._num_head_bytes += len(data)
        super().data_received(data)
        if not self._num_head_bytes or self.transport.is_closing():
            # The head is whole.
            return
        if self._num_head_bytes > self.limits.max_head_bytes:
            self._refuse(431, f"the head has more than {self.limits.max_head_bytes} bytes")
        elif self._head_timer is None:
            # Most heads come whole, and need no timer.
            self._start_timer()

    def _receive_body(self, data: bytes) -> None:
        self._num_idle_bytes += len(data)
        super().data_received(data)
        if self._num_idle_bytes <= self.limits.max_head_bytes or self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started:
            self.transport.close()
        elif not self._in_head:
            self._refuse(431, f"trailers of more than {self.limits.max_head_bytes} bytes")

    def on_body(self, body: bytes) -> None:
        self._num_idle_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head, self._num_head_bytes, self._num_idle_bytes = False, 0, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_timeout_s, self._expire)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expire(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # What came of the next head, a stray line end perhaps, takes no answer from this one.
            self._start_timer()
            return
        if not self._num_head_bytes:
            # Nobody asked anything, so nobody is answered.
            self.transport.close()
            return
        self._refuse(408, f"the head did not arrive within {self.limits.head_timeout_s:g} seconds")

    def _refuse(self, status: int, message: str) -> None:
        self._stop_timer()
        self.count_refused(status)
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            # The client would take an error for a part of the answer.
            self.transport.close()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None}
        body = orjson.dumps({"error": {**error, "code": None}})
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def limited_protocol(
    config: EdgeConfig, on_refused: Callable[[int], None]
) -> type[JoinedHttpProtocol]:
    """For `uvicorn.Config(http=...)`. `on_refused` is told the status of every head turned away."""

    class BoundProtocol(LimitedHttpProtocol):
        limits = config
        count_refused = staticmethod(on_refused)

    return BoundProtocol
