"""Build typed, frozen configuration from a mapping and the environment.

Precedence, lowest first: field defaults, the mapping (a parsed file), environment variables
`BATON_<SECTION>__<FIELD>`, explicit overrides (command line). An unknown key is an error. Nothing
else in the project reads the environment for settings.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from baton.core.errors import ConfigError

T = TypeVar("T")
ENV_PREFIX = "BATON_"


def build(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """An instance of dataclass `cls` from nested mappings.

    Strings are converted to the field's type, so the same code serves files and environment.
    Raises ConfigError naming the key, what it got and what it takes.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown setting {where}{unknown[0]}; known here: {', '.join(sorted(known))}"
        )
    kwargs = {
        name: _convert(hints[name], value, f"{where}{name}") for name, value in values.items()
    }
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def env_values(environ: Mapping[str, str], cls: type[Any]) -> dict[str, Any]:
    """The part of the environment that addresses fields of `cls`, as nested mappings."""
    nested: dict[str, Any] = {}
    sections = {f.name for f in dataclasses.fields(cls)}
    for key, value in sorted(environ.items()):
        if not key.startswith(ENV_PREFIX):
            continue
        path = [part.lower() for part in key[len(ENV_PREFIX) :].split("__")]
        if path[0] not in sections:
            continue
        target = nested
        for part in path[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{key} contradicts the shorter name for {part}")
        target[path[-1]] = value
    return nested


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; mappings merge key by key; None in a later layer changes nothing."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping):
                inner = merged.get(key)
                merged[key] = merge(inner if isinstance(inner, Mapping) else {}, value)
            elif value is not None:
                merged[key] = value
    return merged


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a section of settings, got {value!r}")
        return build(typing.cast(type[Any], hint), value, where=f"{where}.")
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a section of settings by name, got {value!r}")
        item = typing.get_args(hint)[1]
        return {str(k): _convert(item, v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        item = typing.get_args(hint)[0]
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(item, v, where) for v in items if v != "")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _convert_enum(hint, value, where)
    if hint is bool:
        return _convert_bool(value, where)
    if hint in (int, float, str, Path):
        return _convert_scalar(hint, value, where)
    return value


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    choices = [a for a in typing.get_args(hint) if a is not type(None)]
    if value is None or value == "":
        return None
    return _convert(choices[0], value, where)


def _convert_enum(hint: type[Enum], value: Any, where: str) -> Enum:
    try:
        return hint(value)
    except ValueError:
        names = ", ".join(str(member.value) for member in hint)
        raise ConfigError(f"{where} must be one of {names}, got {value!r}") from None


def _convert_bool(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ConfigError(f"{where} must be true or false, got {value!r}")


def _convert_scalar(hint: type[Any], value: Any, where: str) -> Any:
    if isinstance(value, bool) or (hint is int and isinstance(value, float) and value % 1):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    try:
        return hint(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}") from None
