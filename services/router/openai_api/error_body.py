"""An exception as OpenAI clients expect to see it: an HTTP status and an `error` object."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import orjson

from baton.core.errors import (
    ContextLengthExceeded,
    ModelNotFound,
    NotAuthorized,
    Overloaded,
    PayloadTooLarge,
    QuotaExceeded,
    RateLimit,
    RequestError,
    public_message,
    wire_status,
)

_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (ContextLengthExceeded, "context_length_exceeded"),
    (ModelNotFound, "model_not_found"),
    (NotAuthorized, "invalid_api_key"),
    (Overloaded, "rate_limit_exceeded"),
    (PayloadTooLarge, "request_too_large"),
)


class ErrorAnswer(NamedTuple):
    """What goes on the wire."""

    status: int
    body: bytes
    """`{"error": {"message", "type", "param", "code"}}`"""
    headers: tuple[tuple[bytes, bytes], ...]


def error_answer(error: BaseException) -> ErrorAnswer:
    status = wire_status(error)
    param = error.param if isinstance(error, RequestError) else None
    code = next((code for cls, code in _CODES if isinstance(error, cls)), None)
    headers = tuple((name.encode(), value.encode()) for name, value in retry_headers(error))
    body = orjson.dumps(
        {
            "error": {
                "message": client_message(error),
                "type": status.openai_type,
                "param": param,
                "code": code,
            }
        }
    )
    return ErrorAnswer(status.http, body, headers)


def client_message(error: BaseException) -> str:
    """What may be said, as text that can be encoded."""
    return public_message(error).encode(errors="replace").decode()


def retry_headers(error: BaseException) -> list[tuple[str, str]]:
    """What a client needs to come back in time, or with a key; also fit for gRPC metadata."""
    if isinstance(error, NotAuthorized):
        return [("www-authenticate", "Bearer")]
    if not isinstance(error, Overloaded):
        return []
    milliseconds = max(1, math.ceil(1000 * error.retry_after_s))
    headers = [
        ("retry-after", str(max(1, math.ceil(error.retry_after_s)))),
        # Read by OpenAI's clients before the whole seconds above.
        ("retry-after-ms", str(milliseconds)),
    ]
    if isinstance(error, QuotaExceeded):
        headers += rate_limit_headers(error.rate_limits)
    return headers


def rate_limit_headers(rates: Iterable[RateLimit]) -> list[tuple[str, str]]:
    """Where a tenant stands, in names that OpenAI's clients know; also fit for gRPC metadata."""
    return [
        header
        for rate in rates
        for header in (
            (f"x-ratelimit-limit-{rate.name}", str(rate.limit)),
            (f"x-ratelimit-remaining-{rate.name}", str(rate.remaining)),
            (f"x-ratelimit-reset-{rate.name}", f"{rate.reset_s:.3f}s"),
        )
    ]
