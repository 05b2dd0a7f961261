"""What a body says of the output's form, under all the names clients know, as a StructuredSpec."""

from __future__ import annotations

from typing import NamedTuple

import orjson

from baton.core.errors import InvalidRequest
from baton.core.structured import StructuredKind, StructuredSpec
from services.router.edge.preprocess import check_depth, describe, shorten
from services.router.openai_api.schema import GenerationBody, ResponseFormat, StructuredOutputs

RESPONSE_FORMATS = ("text", "json_object", "json_schema")


class Wanted(NamedTuple):
    """A form, and the parameter that asks for it."""

    spec: StructuredSpec
    param: str


def wanted_structure(body: GenerationBody) -> Wanted | None:
    """Raises InvalidRequest where more than one form is asked for, or one that is none."""
    found: list[Wanted] = []
    if body.response_format is not None:
        found += _of_response_format(body.response_format)
    if body.structured_outputs is not None:
        found += _of_structured_outputs(body.structured_outputs)
    for name, kind, value in (
        ("guided_json", StructuredKind.JSON_SCHEMA, body.guided_json),
        ("guided_regex", StructuredKind.REGEX, body.guided_regex),
        ("guided_choice", StructuredKind.CHOICE, body.guided_choice),
        ("guided_grammar", StructuredKind.GRAMMAR, body.guided_grammar),
    ):
        if value is not None:
            found.append(_wanted(kind, value, name))
    if len(found) > 1:
        raise InvalidRequest(
            f"{found[0].param} and {found[1].param} both say what the output must look like; "
            "send one of them",
            param=found[1].param,
        )
    return found[0] if found else None


def _of_response_format(response_format: ResponseFormat) -> list[Wanted]:
    match response_format.type:
        case "text":
            return []
        case "json_object":
            spec = StructuredSpec(StructuredKind.JSON_OBJECT)
            return [Wanted(spec, "response_format")]
        case "json_schema":
            schema = response_format.json_schema
            if schema is None or schema.json_schema is None:
                raise InvalidRequest(
                    "response_format.json_schema.schema is required for type json_schema",
                    param="response_format",
                )
            return [_wanted(StructuredKind.JSON_SCHEMA, schema.json_schema, "response_format")]
    raise InvalidRequest(
        f"response_format.type must be one of {', '.join(RESPONSE_FORMATS)}, "
        f"got {shorten(response_format.type)}",
        param="response_format",
    )


def _of_structured_outputs(outputs: StructuredOutputs) -> list[Wanted]:
    if outputs.structural_tag is not None:
        raise InvalidRequest(
            "structured_outputs.structural_tag is not supported; use json, regex, choice or "
            "grammar",
            param="structured_outputs",
        )
    found = [
        _wanted(kind, value, "structured_outputs")
        for kind, value in (
            (StructuredKind.JSON_SCHEMA, outputs.json_),
            (StructuredKind.REGEX, outputs.regex),
            (StructuredKind.CHOICE, outputs.choice),
            (StructuredKind.GRAMMAR, outputs.grammar),
        )
        if value is not None
    ]
    if outputs.json_object:
        found.append(Wanted(StructuredSpec(StructuredKind.JSON_OBJECT), "structured_outputs"))
    return found


def _wanted(kind: StructuredKind, value: object, param: str) -> Wanted:
    try:
        return Wanted(_spec(kind, value, param), param)
    except InvalidRequest as error:
        raise named(error, param) from None


def _spec(kind: StructuredKind, value: object, param: str) -> StructuredSpec:
    if kind is StructuredKind.CHOICE and isinstance(value, list):
        return StructuredSpec.of_choices(value)
    if kind is StructuredKind.JSON_SCHEMA and isinstance(value, dict):
        check_depth(value, param)
        return StructuredSpec(kind, orjson.dumps(value).decode())
    if not isinstance(value, str):
        raise InvalidRequest(
            f"{param} must be a JSON schema, as an object or as text, got {describe(value)}",
            param=param,
        )
    return StructuredSpec(kind, value)


def named(error: InvalidRequest, param: str) -> InvalidRequest:
    """The same under the name that the client used."""
    message = str(error)
    if error.param != param and param not in message:
        message = f"{param}: {message}"
    return InvalidRequest(message, param=param)
