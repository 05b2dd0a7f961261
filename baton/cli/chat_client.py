"""The part of the OpenAI HTTP API that `baton chat` uses: list models, stream one answer.

Does not know: terminals, conversations.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Unavailable,
)

CONNECT_TIMEOUT_S = 5.0
SSE_DATA = "data:"
SSE_DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """None leaves a value to the server."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(slots=True)
class AnswerStats:
    """Filled while an answer streams. Times are seconds since the request was sent."""

    ttft_s: float | None = None
    last_token_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int | None = None
    finish_reason: str | None = None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first one over the time since it; None when there are none."""
        if self.ttft_s is None or self.last_token_s is None or not self.completion_tokens:
            return None
        decode_s = self.last_token_s - self.ttft_s
        return (self.completion_tokens - 1) / decode_s if decode_s > 0 else None


class ChatClient:
    """One server; use it as a context manager.

    Every method raises Unavailable when nothing answers at `url`, DeadlineExceeded when the
    server is silent for `timeout_s`, and the error that the server names otherwise.
    """

    def __init__(self, url: str, *, timeout_s: float, api_key: str = "") -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        try:
            self._http = httpx.Client(
                base_url=self._url,
                headers={"authorization": f"Bearer {api_key}"} if api_key else None,
                timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
                # A proxy from the environment cannot reach this machine's loopback.
                trust_env=not _is_loopback(httpx.URL(self._url).host),
            )
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{url!r} is not a URL: {error}") from error

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def model_names(self) -> list[str]:
        with self._errors():
            response = self._http.get("/v1/models")
            _check_status(response)
            return [str(card["id"]) for card in response.json()["data"]]

    def stream(
        self, messages: Sequence[ChatMessage], options: ChatOptions, stats: AnswerStats
    ) -> Generator[str, None, None]:
        """Pieces of the answer's text. Closing the iterator cancels the request."""
        body: dict[str, object] = {
            "model": options.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.max_tokens is not None:
            body["max_tokens"] = options.max_tokens
        if options.temperature is not None:
            body["temperature"] = options.temperature
        sent_s = time.monotonic()
        with (
            self._errors(),
            self._http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.is_error:
                response.read()
            _check_status(response)
            for chunk in _chunks(response.iter_lines()):
                text = _read_chunk(chunk, stats)
                if text:
                    stats.last_token_s = time.monotonic() - sent_s
                    if stats.ttft_s is None:
                        stats.ttft_s = stats.last_token_s
                    yield text

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """httpx's errors as ours, with what to do about them."""
        try:
            yield
        except httpx.ConnectError as error:
            raise Unavailable(
                f"nothing answers at {self._url}; start the server with `make serve`, or name "
                "another with --url"
            ) from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(
                f"{self._url} was silent for {self._timeout_s:g} s; raise --timeout, or look at "
                "the server's log"
            ) from error
        except httpx.UnsupportedProtocol as error:
            raise InvalidRequest(f"{self._url!r} is not an http URL: {error}") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._url} broke the connection: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InternalError(
                f"{self._url} does not answer like an OpenAI-compatible server: {error!r}"
            ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_status(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (KeyError, TypeError, ValueError):
        message = response.text[:200] or response.reason_phrase
    raise _server_error(response.status_code, message)


def _server_error(status: int, message: str) -> BatonError:
    text = f"the server answered {status}: {message}"
    if status == httpx.codes.NOT_FOUND:
        return NotFound(text)
    return InvalidRequest(text) if status < httpx.codes.INTERNAL_SERVER_ERROR else Unavailable(text)


def _chunks(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """The JSON objects of an event stream. Raises Unavailable for an error inside of it."""
    for line in lines:
        if not line.startswith(SSE_DATA):
            continue
        data = line[len(SSE_DATA) :].strip()
        if data == SSE_DONE:
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise Unavailable(f"the answer broke off: {chunk['error'].get('message')}")
        yield chunk
    raise Unavailable("the answer broke off: the server closed the stream before its end")


def _read_chunk(chunk: Mapping[str, Any], stats: AnswerStats) -> str:
    usage = chunk.get("usage")
    if usage:
        stats.completion_tokens = usage["completion_tokens"]
        stats.prompt_tokens = usage.get("prompt_tokens")
        stats.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    text = ""
    for choice in chunk["choices"]:
        text += choice["delta"].get("content") or ""
        stats.finish_reason = choice.get("finish_reason") or stats.finish_reason
    return text
