"""One HTTP request and its response over ASGI.

Reads the body up to a limit and within a deadline, and writes answers. Knows no route.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import orjson

from baton.core.errors import InvalidRequest, PayloadTooLarge, RateLimit, RequestCancelled
from services.router.edge.preprocess import new_id
from services.router.openai_api.error_body import ErrorAnswer, error_answer, rate_limit_headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = b"application/json"
_USABLE_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Exchange:
    """Lives as long as the ASGI call. `request_id` is the client's X-Request-Id or a new one."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.receive = receive
        self._send = send
        self.method: str = scope["method"]
        path: str = scope["path"]
        root_path: str = scope.get("root_path", "")
        self.path = path.removeprefix(root_path) or "/"
        self.query: bytes = scope.get("query_string", b"")
        self.arrived_at_s = time.time()
        self.has_started = False
        """The response's status has been sent; errors can no longer change it."""
        self.is_dispatched = False
        """Handed to the dispatcher."""
        self.as_error: Callable[[BaseException], ErrorAnswer] = error_answer
        """How an error is told."""
        self.rate_limits: tuple[RateLimit, ...] = ()
        """Where the tenant stands, for the headers of an answer that is no error."""
        # Of a header that came twice the first counts.
        self._headers: dict[bytes, bytes] = dict(reversed(list(scope["headers"])))
        given = self.header(b"x-request-id")
        self.request_id = given if _USABLE_ID.fullmatch(given) else new_id("req").encode()

    def note_rate_limits(self, rates: tuple[RateLimit, ...]) -> None:
        """Of the last generation counted: the least that is left."""
        self.rate_limits = rates

    def header(self, name: bytes) -> bytes:
        """The value of a header named in lower case, empty when it is missing."""
        return self._headers.get(name, b"")

    def text_header(self, name: str) -> str:
        """As `header`, in text."""
        value = self._headers.get(name.encode())
        return value.decode("latin-1") if value else ""

    async def body(self, max_bytes: int, *, timeout_s: float) -> bytes:
        """The whole body.

        Raises PayloadTooLarge before it has been read when it is longer than `max_bytes`,
        InvalidRequest when it does not arrive in time, RequestCancelled when the client leaves.
        """
        announced = self.header(b"content-length")
        if announced.isdigit() and int(announced[:20]) > max_bytes:
            raise _too_large(max_bytes)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._read(max_bytes)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {timeout_s:g} seconds") from None

    async def _read(self, max_bytes: int) -> bytes:
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise RequestCancelled("the client went away while sending its request")
            part: bytes = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def answer(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Iterable[Header] = ()
    ) -> None:
        """A whole response. HEAD gets the same headers without the body."""
        await self._start(
            status,
            [
                (b"content-type", content_type),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ],
        )
        is_head = self.method == "HEAD"
        await self._send({"type": "http.response.body", "body": b"" if is_head else body})

    async def answer_json(self, status: int, content: object) -> None:
        await self.answer(status, orjson.dumps(content, default=str))

    async def answer_error(self, error: BaseException, headers: Iterable[Header] = ()) -> int:
        """Returns the status that was sent."""
        answer = self.as_error(error)
        await self.answer(answer.status, answer.body, headers=(*answer.headers, *headers))
        return answer.status

    async def start_stream(self) -> None:
        """Begin a response of server-sent events."""
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def stream(self, data: bytes, *, is_last: bool = False) -> None:
        """Waits while the client reads too slowly."""
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.has_started = True
        headers.append((b"x-request-id", self.request_id))
        if status < 400 and self.rate_limits:
            headers += ((k.encode(), v.encode()) for k, v in rate_limit_headers(self.rate_limits))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body is larger than {max_bytes} bytes; send less or raise the router's limit"
    )
