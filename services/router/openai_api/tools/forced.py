"""Calls that a grammar has enforced: nothing else can have been written.

one named tool      the answer is its arguments
any tool, at least one    [{"name": "look_up", "parameters": {"word": "lease"}}, ...]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from baton.core.errors import InvalidRequest
from services.router.openai_api.tools.json_scanner import CallScanner
from services.router.openai_api.tools.tool_events import Arguments, CallBegun, Event

_ANYTHING: Mapping[str, object] = {"type": "object"}


class NamedParser:
    """The whole output is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._has_begun:
            self._has_begun = True
            events.append(CallBegun(0, self._name))
        if text:
            events.append(Arguments(0, text))
        return events

    def finish(self) -> list[Event]:
        return [] if self._has_begun else self.push("")


class ListParser:
    """The output is a list of calls, perhaps cut off."""

    def __init__(self) -> None:
        self._scanner: CallScanner | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._scanner is None:
                text = text.lstrip("[], \t\r\n")
                if text:
                    self._scanner = CallScanner(self._num_calls)
                continue
            found, text = self._scanner.feed(text)
            events += found
            if self._scanner.is_done:
                self._num_calls += 1
            if self._scanner.is_done or self._scanner.is_broken:
                self._scanner = None
        return events

    def finish(self) -> list[Event]:
        return []


def named_schema(parameters: Mapping[str, object] | None) -> str:
    """JSON schema of the arguments of one tool."""
    return json.dumps(parameters or _ANYTHING, ensure_ascii=False)


def list_schema(tools: Sequence[tuple[str, Mapping[str, object] | None]], *, is_one: bool) -> str:
    """JSON schema of a list of calls of `tools` (names and parameters), `is_one`: of a single one.

    Definitions move to the top, where references look for them. Raises InvalidRequest where two
    tools define one name differently.
    """
    definitions: dict[str, dict[str, object]] = {}
    choices: list[object] = []
    for name, parameters in tools:
        own = dict(parameters or _ANYTHING)
        for key in ("$defs", "definitions"):
            _hoist(definitions.setdefault(key, {}), own.pop(key, None))
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": own},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, object] = {
        "type": "array",
        "minItems": 1,
        "items": choices[0] if len(choices) == 1 else {"anyOf": choices},
        **{key: found for key, found in definitions.items() if found},
    }
    if is_one:
        schema["maxItems"] = 1
    return json.dumps(schema, ensure_ascii=False)


def _hoist(into: dict[str, object], found: object) -> None:
    if not isinstance(found, Mapping):
        return
    for name, definition in found.items():
        if into.setdefault(name, definition) != definition:
            raise InvalidRequest(
                f"tools: two of them define {name[:80]!r} differently; name them apart",
                param="tools",
            )
