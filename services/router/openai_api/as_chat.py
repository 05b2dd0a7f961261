"""Bodies of other APIs as bodies of the chat route, which alone knows how to answer.

What the chat route finds wrong is told under the names that the client used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from baton.core.errors import InvalidRequest
from services.router.edge.preprocess import check_depth, describe
from services.router.openai_api.schema import ChatBody, SharedFields, validate


class SharedOptions(SharedFields):
    """What bodies of the other APIs here take over from the chat route."""

    chat_template_kwargs: dict[str, Any] | None = None


def chat_body(
    options: SharedOptions, messages: Sequence[Mapping[str, object]], **fields: object
) -> ChatBody:
    """`messages` and `fields` as the chat route takes them. Raises InvalidRequest under the chat
    route's names; see `renamed`."""
    shared = {name: getattr(options, name) for name in SharedOptions.model_fields}
    content = {**shared, **fields, "messages": list(messages)}
    return validate({k: v for k, v in content.items() if v is not None}, ChatBody)


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a chat field name the client's field instead; `names`: chat to client."""
    try:
        yield
    except InvalidRequest as error:
        param = _client_name(error.param, names)
        if param == error.param or error.param is None:
            raise
        message = str(error).replace(error.param, str(param))
        raise type(error)(message, param=param) from None


def _client_name(param: str | None, names: Mapping[str, str]) -> str | None:
    if param is None:
        return None
    if param.startswith("tools."):
        # Neither API wraps a definition.
        head, found, field = param.partition(".function.")
        return f"{head}.{names.get(f'function.{field}', field)}" if found else param
    first, dot, rest = param.partition(".")
    return names.get(first, first) + dot + rest


def call_arguments(arguments: object, where: str) -> dict[str, object]:
    """Of a call made earlier: an object, or its JSON. Raises InvalidRequest."""
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"{where} is not valid JSON: {error}", param=where) from None
    check_depth(arguments, where)
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            f"{where} must be a JSON object, got {describe(arguments)}", param=where
        )
    return arguments


def call_entry(call_id: str, name: str, arguments: object, where: str) -> dict[str, object]:
    """An entry of a chat message's `tool_calls`."""
    function = {"name": name, "arguments": call_arguments(arguments, where)}
    return {"id": call_id, "type": "function", "function": function}


def text_of(parts: object, where: str, kinds: Mapping[str, str]) -> str:
    """A string, or a list of text parts: `kinds` says which field holds the text of a kind. Raises
    InvalidRequest for parts of other kinds."""
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list):
        raise InvalidRequest(
            f"{where} must be a string or a list of text parts, got {describe(parts)}", param=where
        )
    return "".join(part_text(part, f"{where}.{i}", kinds) for i, part in enumerate(parts))


def part_text(part: object, where: str, kinds: Mapping[str, str]) -> str:
    """Raises InvalidRequest."""
    if not isinstance(part, dict):
        raise InvalidRequest(f"{where} must be an object, got {describe(part)}", param=where)
    kind = part.get("type")
    field = kinds.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise InvalidRequest(
            f"{where}.type must be one of {', '.join(kinds)}, got {describe(kind)}; this model "
            "takes text only",
            param=f"{where}.type",
        )
    return string_field(part, field, where)


def string_field(item: Mapping[str, object], name: str, where: str) -> str:
    """Raises InvalidRequest."""
    value = item.get(name)
    if not isinstance(value, str):
        problem = "is required" if value is None else f"must be a string, got {describe(value)}"
        raise InvalidRequest(f"{where}.{name} {problem}", param=f"{where}.{name}")
    return value
