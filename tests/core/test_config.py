from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import build, env_values, merge
from baton.core.errors import ConfigError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    size: int = 1
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    colour: Colour = Colour.RED
    is_on: bool = False
    path: Path | None = None
    sizes: tuple[int, ...] = ()
    colours: tuple[Colour, ...] = ()
    free: Mapping[str, Any] = field(default_factory=dict)


def test_strings_become_the_fields_types():
    built = build(
        Outer,
        {
            "name": "x",
            "inner": {"size": "7", "ratio": "0.25"},
            "colour": "blue",
            "is_on": "yes",
            "path": "/tmp/x",
            "sizes": "1,2,3",
            "colours": ["red", "blue"],
            "free": {"any": {"thing": 1}},
        },
    )
    assert built == Outer(
        "x", Inner(7, 0.25), Colour.BLUE, True, Path("/tmp/x"), (1, 2, 3),
        (Colour.RED, Colour.BLUE), {"any": {"thing": 1}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "colr": 1}, "unknown setting colr; known here: colour,"),
        ({"name": "x", "inner": {"sise": 1}}, r"unknown setting inner\.sise"),
        ({"name": "x", "inner": {"size": "many"}}, r"inner\.size must be int, got 'many'"),
        ({"name": "x", "inner": {"size": 1.5}}, r"inner\.size must be int, got 1\.5"),
        ({"name": "x", "inner": {"size": True}}, r"inner\.size must be int, got True"),
        ({"name": "x", "inner": 5}, "inner is a section of settings, got 5"),
        ({"name": "x", "colour": "green"}, "colour must be one of red, blue, got 'green'"),
        ({"name": "x", "is_on": "maybe"}, "is_on must be true or false, got 'maybe'"),
        ({"name": "x", "sizes": 5}, "sizes must be a list, got 5"),
        ({}, "name"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_empty_string_clears_an_optional_field():
    assert build(Outer, {"name": "x", "path": ""}).path is None


def test_environment_addresses_nested_fields_and_ignores_strangers():
    environ = {
        "BATON_INNER__SIZE": "3",
        "BATON_NAME": "n",
        "BATON_UNRELATED": "1",
        "HOME": "/root",
    }
    assert env_values(environ, Outer) == {"inner": {"size": "3"}, "name": "n"}


def test_contradicting_environment_names_are_an_error():
    with pytest.raises(ConfigError, match="BATON_INNER__SIZE"):
        env_values({"BATON_INNER": "3", "BATON_INNER__SIZE": "3"}, Outer)


def test_later_layers_win_key_by_key():
    merged = merge(
        {"inner": {"size": 1, "ratio": 1.0}, "name": "a"},
        {"inner": {"size": 2}, "name": None},
        {"colour": "red"},
    )
    assert merged == {"inner": {"size": 2, "ratio": 1.0}, "name": "a", "colour": "red"}


def test_merge_changes_none_of_its_layers():
    first = {"inner": {"size": 1}}
    merge(first, {"inner": {"size": 2}})
    assert first == {"inner": {"size": 1}}


@dataclass(frozen=True)
class Named:
    by_name: Mapping[str, Inner] = field(default_factory=dict)


def test_sections_by_name():
    built = build(Named, {"by_name": {"a": {"size": "3"}, "b": {}}})
    assert built.by_name == {"a": Inner(size=3), "b": Inner()}
    environ = {"BATON_BY_NAME__A__SIZE": "7"}
    assert build(Named, env_values(environ, Named)).by_name["a"].size == 7
    with pytest.raises(ConfigError, match=r"unknown setting by_name\.a\.sise"):
        build(Named, {"by_name": {"a": {"sise": 1}}})
    with pytest.raises(ConfigError, match="by_name is a section of settings by name, got 5"):
        build(Named, {"by_name": 5})
