"""An exception in the shape of Anthropic's API."""

from __future__ import annotations

import orjson

from baton.core.errors import RequestError, wire_status
from services.router.openai_api.error_body import ErrorAnswer, client_message, error_answer

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def message_error(error: BaseException) -> ErrorAnswer:
    """`{"type": "error", "error": {"type", "message", "param"}}`; status and headers as ever."""
    status = wire_status(error).http
    kind = _KINDS.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    param = error.param if isinstance(error, RequestError) else None
    body = {
        "type": "error",
        "error": {"type": kind, "message": client_message(error), "param": param},
    }
    return ErrorAnswer(status, orjson.dumps(body), error_answer(error).headers)
