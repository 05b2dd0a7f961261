"""A server with OpenAI's HTTP API: chat or completions, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import orjson

from baton.core.errors import DeadlineExceeded, InternalError, InvalidRequest, Unavailable
from baton.loadtest.http_wire import (
    BrokenConnection,
    Pool,
    parse_url,
    request_bytes,
)
from baton.loadtest.outcome import ErrorKind, Outcome
from baton.loadtest.sse import StreamReader, read_answer
from baton.loadtest.target import Ask

MAX_BODY_BYTES = 64 << 20
QUESTION_TIMEOUT_S = 10.0


class Route(Enum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How requests are put."""

    url: str
    model: str = ""
    route: Route = Route.CHAT
    is_streaming: bool = True
    ignores_eos: bool = True
    """Answers have exactly the wanted length; an extension that most servers know."""
    timeout_s: float = 300.0
    """Of one request, connection included."""
    headers: tuple[tuple[str, str], ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)
    """Fields of every body, over those that are made here."""
    ca_file: str | None = None


class OpenAiTarget:
    """Implements Target."""

    def __init__(self, options: HttpOptions, now: Callable[[], float]) -> None:
        self._options = options
        self._address = parse_url(options.url, options.ca_file)
        self._pool = Pool(self._address, now)
        _check_headers(options.headers)

    @property
    def place(self) -> str:
        return self._options.url

    def prepare(self, ask: Ask) -> HttpExchange:
        options = self._options
        headers = [("X-Request-Id", ask.request_id), *options.headers]
        if ask.session:
            headers.append(("X-Session-Id", ask.session))
        body = orjson.dumps(self._body(ask))
        request = request_bytes("POST", self._address, options.route.value, headers, body)
        return HttpExchange(self._pool, request, options)

    async def model_names(self) -> list[str]:
        reader = _WholeReader()
        request = request_bytes("GET", self._address, "/v1/models", self._options.headers, b"")
        where = self._options.url
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT_S):
                await self._pool.exchange(request, reader, lambda at_s: None)
        except TimeoutError:
            raise DeadlineExceeded(f"{where} was silent for {QUESTION_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise Unavailable(f"nothing answers at {where}: {_reason(error)}") from None
        except (BrokenConnection, ValueError) as error:
            raise Unavailable(f"{where} does not speak HTTP: {error}") from None
        if reader.status != 200:
            raise InvalidRequest(
                f"{where}/v1/models answered {reader.status}: {error_text(reader.body())}"
            )
        try:
            return [str(card["id"]) for card in orjson.loads(reader.body())["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InternalError(
                f"{where} does not answer like an OpenAI-compatible server: {error!r}"
            ) from None

    async def aclose(self) -> None:
        await self._pool.aclose()

    def _body(self, ask: Ask) -> dict[str, object]:
        options = self._options
        body: dict[str, object] = {
            "model": options.model,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": options.is_streaming,
        }
        if options.route is Route.CHAT:
            body["messages"] = [{"role": m.role, "content": m.content} for m in ask.prompt.messages]
        else:
            body["prompt"] = list(ask.prompt.ids) or ask.prompt.text
        if options.is_streaming:
            body["stream_options"] = {"include_usage": True}
        if options.ignores_eos:
            body["ignore_eos"] = True
        return {**body, **options.extra}


class HttpExchange:
    """Implements Exchange, and Receiver for its connection."""

    def __init__(self, pool: Pool, request: bytes, options: HttpOptions) -> None:
        self._pool = pool
        self._request = request
        self._options = options
        self._outcome: Outcome
        self._whole = _WholeReader()
        self._stream: StreamReader | None = None

    async def run(self, outcome: Outcome) -> None:
        self._outcome = outcome
        outcome.sent_s = outcome.now()
        timeout_s = self._options.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                ended_at_s = await self._pool.exchange(self._request, self, self._on_connected)
        except TimeoutError:
            outcome.fail(ErrorKind.TIMEOUT, f"not over within {timeout_s:g} s")
        except OSError as error:
            outcome.fail(ErrorKind.CONNECT, _reason(error))
        except BrokenConnection as error:
            kind = ErrorKind.CUT_OFF if error.had_answer else ErrorKind.CONNECT
            outcome.fail(kind, str(error))
        except ValueError as error:
            outcome.fail(ErrorKind.MALFORMED, str(error))
        else:
            self._end(ended_at_s)

    def on_status(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._whole.on_status(status, headers)
        if status == 200 and headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            self._stream = StreamReader(self._outcome)

    def on_body(self, at_s: float, piece: bytes) -> None:
        if self._stream is not None:
            self._stream.feed(at_s, piece)
        else:
            self._whole.on_body(at_s, piece)

    def _on_connected(self, at_s: float) -> None:
        self._outcome.connected_s = at_s

    def _end(self, at_s: float) -> None:
        if self._stream is not None:
            self._stream.close(at_s)
        elif self._whole.status != 200:
            code, message = str(self._whole.status), error_text(self._whole.body())
            self._outcome.fail(ErrorKind.REFUSED, message, code)
        elif self._options.is_streaming:
            self._outcome.fail(ErrorKind.MALFORMED, "a stream was asked for, and did not come")
        else:
            read_answer(at_s, self._whole.body(), self._outcome)


class _WholeReader:
    """A response kept whole."""

    def __init__(self) -> None:
        self.status = 0
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def on_status(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status

    def on_body(self, at_s: float, piece: bytes) -> None:
        self._num_bytes += len(piece)
        if self._num_bytes > MAX_BODY_BYTES:
            raise ValueError(f"the answer is longer than {MAX_BODY_BYTES} bytes")
        self._parts.append(piece)

    def body(self) -> bytes:
        return b"".join(self._parts)


def error_text(body: bytes) -> str:
    """The message of an error body in OpenAI's shape, or the body's beginning."""
    try:
        answer: Any = orjson.loads(body)
        return str(answer["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _check_headers(headers: tuple[tuple[str, str], ...]) -> None:
    for name, value in headers:
        if not (name.isascii() and name.replace("-", "").replace("_", "").isalnum()):
            raise InvalidRequest(f"{name!r} is no name of a header; write 'Name: value'")
        if not (value.isascii() and value.isprintable()):
            raise InvalidRequest(f"the value of the header {name} must be printable ASCII")


def _reason(error: OSError) -> str:
    """The system's words, without the address that it repeats."""
    return error.strerror or str(error) or type(error).__name__
