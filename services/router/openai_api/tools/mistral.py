"""Calls as Mistral's models write them, behind a special token:

[TOOL_CALLS] [{"name": "look_up", "arguments": {"word": "lease"}}, {"name": ...}]
[TOOL_CALLS]look_up[ARGS]{"word": "lease"}[TOOL_CALLS]...
"""

from __future__ import annotations

import re
from enum import Enum

from services.router.openai_api.tools.json_scanner import CallScanner, ObjectScanner
from services.router.openai_api.tools.text_gate import TextGate
from services.router.openai_api.tools.tool_events import Arguments, CallBegun, Event, Text

MARK, ARGS = "[TOOL_CALLS]", "[ARGS]"
_HEAD = re.compile(
    r"\s*([A-Za-z0-9_.:/-]+)\s*(?:\[CALL_ID\][A-Za-z0-9]*)?\s*(?:\[ARGS\])?\s*(?=\{)"
)
_MAX_HEAD_CHARS = 256


class _State(Enum):
    TEXT = 1
    HEAD = 2
    """Behind the mark: a list, or a name."""
    LIST = 3
    CALL = 4
    """An object of the list."""
    ARGUMENTS = 5
    """Of a call whose name stood before them."""


class MistralParser:
    def __init__(self) -> None:
        self._gate = TextGate(MARK)
        self._state = _State.TEXT
        self._head = ""
        self._scanner: CallScanner | None = None
        self._arguments = ObjectScanner()
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            match self._state:
                case _State.TEXT:
                    text = self._read_text(text, events)
                case _State.HEAD:
                    text = self._read_head(text, events)
                case _State.LIST:
                    text = self._read_list(text)
                case _State.CALL:
                    text = self._read_call(text, events)
                case _State.ARGUMENTS:
                    text = self._read_arguments(text, events)
        return events

    def finish(self) -> list[Event]:
        rest = self._gate.finish()
        if self._state is _State.HEAD:
            rest += MARK + self._head
        elif self._scanner is not None and not self._scanner.has_begun:
            rest += MARK + self._head + self._scanner.text
        if self._num_calls:
            rest = rest.rstrip()
        return [Text(rest)] if rest else []

    def _read_text(self, text: str, events: list[Event]) -> str:
        shown, marker, rest = self._gate.push(text)
        if shown:
            events.append(Text(shown))
        if marker is not None:
            self._state, self._head = _State.HEAD, ""
        return rest

    def _read_head(self, text: str, events: list[Event]) -> str:
        self._head += text
        begun = self._head.lstrip()
        if begun.startswith("[") and not MARK.startswith(begun[: len(MARK)]):
            self._state = _State.LIST
            return self._cut_head(len(self._head) - len(begun) + 1)
        found = _HEAD.match(self._head)
        if found is not None:
            events.append(CallBegun(self._num_calls, found[1]))
            self._num_calls += 1
            self._state, self._arguments = _State.ARGUMENTS, ObjectScanner()
            return self._cut_head(found.end())
        if len(self._head) > _MAX_HEAD_CHARS:
            events.append(Text(MARK + self._head))
            self._state, self._head = _State.TEXT, ""
        return ""

    def _cut_head(self, at: int) -> str:
        self._head, rest = self._head[:at], self._head[at:]
        return rest

    def _read_list(self, text: str) -> str:
        stripped = text.lstrip(", \t\r\n")
        if stripped.startswith("]"):
            self._state = _State.TEXT
            return stripped[1:]
        if stripped:
            self._state, self._scanner = _State.CALL, CallScanner(self._num_calls)
        return stripped

    def _read_call(self, text: str, events: list[Event]) -> str:
        scanner = self._scanner
        assert scanner is not None
        found, rest = scanner.feed(text)
        events += found
        if scanner.is_broken:
            events.append(Text((MARK + self._head if not self._num_calls else "") + scanner.text))
            self._state, self._scanner = _State.TEXT, None
        elif scanner.is_done:
            self._num_calls += 1
            self._state, self._scanner = _State.LIST, None
        return rest

    def _read_arguments(self, text: str, events: list[Event]) -> str:
        for at, char in enumerate(text, start=1):
            self._arguments.feed(char)
            if self._arguments.depth <= 0 and not self._arguments.in_string:
                events.append(Arguments(self._num_calls - 1, text[:at]))
                self._state = _State.TEXT
                return text[at:]
        events.append(Arguments(self._num_calls - 1, text))
        return ""
