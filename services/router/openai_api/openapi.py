"""The API's own description, GET /openapi.json: what a body may hold comes from the definitions
that parse it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic.json_schema import models_json_schema

import baton
from services.router.openai_api.schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

Schema = dict[str, object]

_REF = "#/components/schemas/"
_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_INTEGERS: Schema = {"type": "array", "items": _INTEGER}
_NULLABLE_STRING: Schema = {"type": ["string", "null"]}


def _object(properties: Mapping[str, object], *optional: str) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
    }


def _array(name: str) -> Schema:
    return {"type": "array", "items": {"$ref": _REF + name}}


ANSWERS: dict[str, Schema] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _STRING,
                    "type": _STRING,
                    "param": _NULLABLE_STRING,
                    "code": _NULLABLE_STRING,
                }
            )
        }
    ),
    "Usage": _object(
        {
            "prompt_tokens": _INTEGER,
            "completion_tokens": _INTEGER,
            "total_tokens": _INTEGER,
            "prompt_tokens_details": _object({"cached_tokens": _INTEGER}),
        }
    ),
    "ToolCall": _object(
        {
            "id": _STRING,
            "type": {"const": "function"},
            "function": _object({"name": _STRING, "arguments": _STRING}),
        }
    ),
    "ChatChoice": _object(
        {
            "index": _INTEGER,
            "message": _object(
                {
                    "role": {"const": "assistant"},
                    "content": _NULLABLE_STRING,
                    "refusal": _NULLABLE_STRING,
                    "tool_calls": _array("ToolCall"),
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
    "CompletionChoice": _object(
        {
            "index": _INTEGER,
            "text": _STRING,
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
    "ChatAnswer": _object(
        {
            "id": _STRING,
            "object": {"const": "chat.completion"},
            "created": _INTEGER,
            "model": _STRING,
            "choices": _array("ChatChoice"),
            "usage": {"$ref": _REF + "Usage"},
        }
    ),
    "CompletionAnswer": _object(
        {
            "id": _STRING,
            "object": {"const": "text_completion"},
            "created": _INTEGER,
            "model": _STRING,
            "choices": _array("CompletionChoice"),
            "usage": {"$ref": _REF + "Usage"},
        }
    ),
    "Model": _object(
        {
            "id": _STRING,
            "object": {"const": "model"},
            "created": _INTEGER,
            "owned_by": _STRING,
            "root": _STRING,
            "max_model_len": _INTEGER,
        }
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _array("Model")}),
    "Tokens": _object(
        {
            "count": _INTEGER,
            "max_model_len": _INTEGER,
            "tokens": _INTEGERS,
            "token_strs": {"type": ["array", "null"], "items": _STRING},
        }
    ),
    "DetokenizedText": _object({"prompt": _STRING}),
    "Health": _object(
        {
            "status": {"enum": ["ok", "unavailable"]},
            "reason": _STRING,
            "detail": {"type": "object"},
        }
    ),
    "Version": _object({"version": _STRING}),
    "Load": _object({"server_load": _INTEGER}),
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


ROUTES = (
    _Route("post", "/v1/chat/completions", "Answer a conversation", "ChatAnswer", ChatBody, True),
    _Route("post", "/v1/completions", "Continue texts", "CompletionAnswer", CompletionBody, True),
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
    _Route("post", "/reset_prefix_cache", "Not offered", None, error_answers=(501,)),
    _Route("get", "/openapi.json", "This document", None, is_open=True),
)
_BODY_ERRORS = (400, 404, 413, 429, 500, 503, 504)


def openapi_document() -> Schema:
    """Made once per process."""
    bodies = [(route.body, "validation") for route in ROUTES if route.body is not None]
    _, found = models_json_schema(bodies, ref_template=_REF + "{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, object]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": baton.__version__},
        "paths": paths,
        "components": {
            "schemas": {**found["$defs"], **ANSWERS},
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
        operation["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": _STRING}
        ]
    if route.body is not None:
        content = {"application/json": {"schema": {"$ref": _REF + route.body.__name__}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(route: _Route) -> Schema:
    content: Schema = {}
    if route.answer is not None:
        content["application/json"] = {"schema": {"$ref": _REF + route.answer}}
    elif route.path == "/metrics":
        content["text/plain"] = {"schema": _STRING}
    if route.streams:
        content["text/event-stream"] = {"schema": _STRING}
    responses: Schema = {}
    if 501 not in route.error_answers:
        responses["200"] = {"description": "done", "content": content}
    errors = {*route.error_answers, *(() if route.is_open else (401,))}
    if route.body is not None:
        errors |= set(_BODY_ERRORS)
    for status in sorted(errors):
        # An unhealthy router says so in the words of its health.
        is_health = route.answer == "Health"
        schema = {"$ref": _REF + ("Health" if is_health else "Error")}
        responses[str(status)] = {
            "description": "error",
            "content": {"application/json": {"schema": schema}},
        }
    return responses
