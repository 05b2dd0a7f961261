"""An exception as OpenAI clients expect to see it: an HTTP status and an `error` object."""

from __future__ import annotations

import math
from typing import NamedTuple

import orjson

from baton.core.errors import (
    ContextLengthExceeded,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    RequestError,
    public_message,
    wire_status,
)

_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (ContextLengthExceeded, "context_length_exceeded"),
    (ModelNotFound, "model_not_found"),
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
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if isinstance(error, Overloaded):
        headers = ((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))),)
    message = public_message(error).encode(errors="replace").decode()
    body = orjson.dumps(
        {
            "error": {
                "message": message,
                "type": status.openai_type,
                "param": param,
                "code": code,
            }
        }
    )
    return ErrorAnswer(status.http, body, headers)
