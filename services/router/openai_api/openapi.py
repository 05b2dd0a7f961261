"""The API's own description, GET /openapi.json: what a body may hold comes from the definitions
that parse it."""

from __future__ import annotations

from typing import NamedTuple

from pydantic.json_schema import models_json_schema

import baton
from services.router.openai_api.json_schema import (
    INTEGER,
    NULLABLE_STRING,
    REF,
    STRING,
    Schema,
    array_of,
    object_of,
)
from services.router.openai_api.messages.message_schema import CountTokensBody, MessagesBody
from services.router.openai_api.openapi_dialects import DIALECT_ANSWERS
from services.router.openai_api.responses.response_schema import ResponsesBody
from services.router.openai_api.schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

_INTEGERS: Schema = {"type": "array", "items": INTEGER}


ANSWERS: dict[str, Schema] = {
    "Error": object_of(
        {
            "error": object_of(
                {
                    "message": STRING,
                    "type": STRING,
                    "param": NULLABLE_STRING,
                    "code": NULLABLE_STRING,
                }
            )
        }
    ),
    "Usage": object_of(
        {
            "prompt_tokens": INTEGER,
            "completion_tokens": INTEGER,
            "total_tokens": INTEGER,
            "prompt_tokens_details": object_of({"cached_tokens": INTEGER}),
        }
    ),
    "ToolCall": object_of(
        {
            "id": STRING,
            "type": {"const": "function"},
            "function": object_of({"name": STRING, "arguments": STRING}),
        }
    ),
    "ChatChoice": object_of(
        {
            "index": INTEGER,
            "message": object_of(
                {
                    "role": {"const": "assistant"},
                    "content": NULLABLE_STRING,
                    "refusal": NULLABLE_STRING,
                    "tool_calls": array_of("ToolCall"),
                },
                "tool_calls",
            ),
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
            "stop_reason": {"type": ["string", "integer", "null"]},
            "token_ids": _INTEGERS,
        },
        "token_ids",
    ),
    "CompletionChoice": object_of(
        {
            "index": INTEGER,
            "text": STRING,
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": {"enum": ["stop", "length"]},
            "stop_reason": {"type": ["string", "integer", "null"]},
            "token_ids": _INTEGERS,
            "prompt_token_ids": _INTEGERS,
            "prompt_logprobs": {"type": "array"},
        },
        "token_ids",
        "prompt_token_ids",
        "prompt_logprobs",
    ),
    "ChatAnswer": object_of(
        {
            "id": STRING,
            "object": {"const": "chat.completion"},
            "created": INTEGER,
            "model": STRING,
            "choices": array_of("ChatChoice"),
            "usage": {"$ref": REF + "Usage"},
        }
    ),
    "CompletionAnswer": object_of(
        {
            "id": STRING,
            "object": {"const": "text_completion"},
            "created": INTEGER,
            "model": STRING,
            "choices": array_of("CompletionChoice"),
            "usage": {"$ref": REF + "Usage"},
        }
    ),
    "Model": object_of(
        {
            "id": STRING,
            "object": {"const": "model"},
            "created": INTEGER,
            "owned_by": STRING,
            "root": STRING,
            "max_model_len": INTEGER,
        }
    ),
    "ModelList": object_of({"object": {"const": "list"}, "data": array_of("Model")}),
    "Tokens": object_of(
        {
            "count": INTEGER,
            "max_model_len": INTEGER,
            "tokens": _INTEGERS,
            "token_strs": {"type": ["array", "null"], "items": STRING},
        }
    ),
    "DetokenizedText": object_of({"prompt": STRING}),
    "Health": object_of(
        {
            "status": {"enum": ["ok", "unavailable"]},
            "reason": STRING,
            "detail": {"type": "object"},
        }
    ),
    "Version": object_of({"version": STRING}),
    "Load": object_of({"server_load": INTEGER}),
}
"""Of what is answered."""


class _Route(NamedTuple):
    method: str
    path: str
    summary: str
    answer: str | None
    """Its schema; None: text."""
    body: type[Body] | None = None
    streams: bool = False
    """With `stream: true` it answers with server-sent events."""
    is_open: bool = False
    """No API key is asked for."""
    error_answers: tuple[int, ...] = ()
    """Beside 401, and what a body can do wrong."""
    error: str = "Error"
    """The schema of its errors."""


ROUTES = (
    _Route("post", "/v1/chat/completions", "Answer a conversation", "ChatAnswer", ChatBody, True),
    _Route("post", "/v1/completions", "Continue texts", "CompletionAnswer", CompletionBody, True),
    _Route("post", "/v1/responses", "Answer an input", "ResponseAnswer", ResponsesBody, True),
    _Route("get", "/v1/responses/{id}", "A stored one", "ResponseAnswer", error_answers=(400, 404)),
    _Route("delete", "/v1/responses/{id}", "Forget it", "ResponseDeleted", error_answers=(404,)),
    _Route(
        "post",
        "/v1/responses/{id}/cancel",
        "End one that runs in the background",
        "ResponseAnswer",
        error_answers=(400, 404),
    ),
    _Route(
        "post",
        "/v1/messages",
        "Answer a conversation, in Anthropic's shape",
        "MessageAnswer",
        MessagesBody,
        True,
        error="MessageError",
    ),
    _Route(
        "post",
        "/v1/messages/count_tokens",
        "Tokens of such a conversation",
        "InputTokens",
        CountTokensBody,
        error="MessageError",
    ),
    _Route("get", "/v1/models", "The models served", "ModelList"),
    _Route("get", "/v1/models/{id}", "One of them", "Model", error_answers=(404,)),
    _Route("post", "/tokenize", "Tokens of a text or a conversation", "Tokens", TokenizeBody),
    _Route("post", "/detokenize", "The text of tokens", "DetokenizedText", DetokenizeBody),
    _Route("get", "/health", "Whether it serves", "Health", is_open=True, error_answers=(503,)),
    _Route("get", "/ping", "As /health", "Health", is_open=True, error_answers=(503,)),
    _Route("post", "/ping", "As /health", "Health", is_open=True, error_answers=(503,)),
    _Route("get", "/version", "The version of this software", "Version", is_open=True),
    _Route("get", "/load", "Requests this copy is answering", "Load", is_open=True),
    _Route("get", "/metrics", "Metrics in Prometheus' format", None, is_open=True),
    _Route("post", "/v1/embeddings", "Not offered", None, error_answers=(501,)),
    _Route("post", "/reset_prefix_cache", "Not offered", None, error_answers=(501,)),
    _Route("get", "/openapi.json", "This document", None, is_open=True),
)
_BODY_ERRORS = (400, 404, 413, 429, 500, 503, 504)


def openapi_document() -> Schema:
    """Made once per process."""
    bodies = [(route.body, "validation") for route in ROUTES if route.body is not None]
    _, found = models_json_schema(bodies, ref_template=REF + "{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, object]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": baton.__version__},
        "paths": paths,
        "components": {
            "schemas": {**found["$defs"], **ANSWERS, **DIALECT_ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: _Route) -> Schema:
    name = route.path.strip("/").replace("/", "_").replace(".", "_").replace("{id}", "one")
    operation: Schema = {
        "operationId": f"{route.method}_{name}",
        "summary": route.summary,
        "responses": _responses(route),
        # Where there are keys, that is; without any the header is not looked at.
        "security": [] if route.is_open else [{"key": []}, {}],
    }
    if "{id}" in route.path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": STRING}]
    if route.body is not None:
        content = {"application/json": {"schema": {"$ref": REF + route.body.__name__}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(route: _Route) -> Schema:
    content: Schema = {}
    if route.answer is not None:
        content["application/json"] = {"schema": {"$ref": REF + route.answer}}
    elif route.path == "/metrics":
        content["text/plain"] = {"schema": STRING}
    if route.streams:
        # Without a schema: readers of this document apply one to events, not to the text.
        content["text/event-stream"] = {}
    responses: Schema = {}
    if 501 not in route.error_answers:
        responses["200"] = {"description": "done", "content": content}
    errors = {*route.error_answers, *(() if route.is_open else (401,))}
    if route.body is not None:
        errors |= set(_BODY_ERRORS)
    for status in sorted(errors):
        # An unhealthy router says so in the words of its health.
        is_health = route.answer == "Health"
        schema = {"$ref": REF + ("Health" if is_health else route.error)}
        responses[str(status)] = {
            "description": "error",
            "content": {"application/json": {"schema": schema}},
        }
    return responses
