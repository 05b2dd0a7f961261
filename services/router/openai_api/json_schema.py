"""Small parts that descriptions of answers are made of."""

from __future__ import annotations

from collections.abc import Mapping

Schema = dict[str, object]

REF = "#/components/schemas/"
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NULLABLE_STRING: Schema = {"type": ["string", "null"]}


def object_of(properties: Mapping[str, object], *optional: str) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
    }


def array_of(name: str) -> Schema:
    """Of a schema that has this name."""
    return {"type": "array", "items": {"$ref": REF + name}}
