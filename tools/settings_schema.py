"""JSON schemas of the settings dataclasses: types, defaults, and their docstrings as descriptions.

    settings_schema(RouterConfig, without={"model_path", "shared.url"})

`without` names settings, by their path, that are left out. Not known here: charts.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
_SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "string", Path: "string"}


def settings_schema(
    cls: type[Any], *, without: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> Schema:
    """`defaults`: what is laid over the fields' own, as a pool's defaults are."""
    return _section(cls, "", frozenset(without), defaults or {})


def setting_paths(cls: type[Any], prefix: str = "") -> set[str]:
    """Every setting of `cls` that is not itself a section, as section.field."""
    hints = typing.get_type_hints(cls)
    paths: set[str] = set()
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            paths |= setting_paths(hints[field.name], f"{path}.")
        else:
            paths.add(path)
    return paths


def schema_paths(schema: Schema, prefix: str = "") -> set[str]:
    """The same of a schema made here."""
    paths: set[str] = set()
    for name, part in schema["properties"].items():
        path = f"{prefix}{name}"
        if "properties" in part:
            paths |= schema_paths(part, f"{path}.")
        else:
            paths.add(path)
    return paths


def _section(
    cls: type[Any], prefix: str, without: frozenset[str], defaults: Mapping[str, Any]
) -> Schema:
    hints = typing.get_type_hints(cls)
    texts = _descriptions(cls)
    properties: Schema = {}
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if path in without:
            continue
        hint, over = hints[field.name], defaults.get(field.name)
        if dataclasses.is_dataclass(hint):
            inner = over if isinstance(over, Mapping) else {}
            part = _section(typing.cast(type[Any], hint), f"{path}.", without, inner)
            if not part["properties"]:
                continue
        else:
            part = _type(hint)
            default = over if over is not None else _default(field)
            if default is not dataclasses.MISSING:
                part["default"] = _plain(default)
        if field.name in texts:
            part["description"] = texts[field.name]
        properties[field.name] = part
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _type(hint: Any) -> Schema:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (choice,) = [a for a in typing.get_args(hint) if a is not type(None)]
        return {"anyOf": [_type(choice), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _type(typing.get_args(hint)[0])}
    if origin is not None:
        return {"type": "object", "additionalProperties": _type(typing.get_args(hint)[1])}
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type[Any], hint), "", frozenset(), {})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if hint is bool:
        return {"type": "boolean"}
    return {"type": _SCALARS[hint]}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    """As it would stand in a settings file."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value


@functools.cache
def _descriptions(cls: type[Any]) -> Mapping[str, str]:
    """Field -> the string below it in the source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
