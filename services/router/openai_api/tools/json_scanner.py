"""JSON followed while it is written: where an object ends, and a call's name and arguments in it.

    {"name": "look_up", "arguments": {"word": "lease"}}
             ^ Name once it is whole  ^ arguments, as they come

Knows nothing of what stands around the object.
"""

from __future__ import annotations

import json
from enum import Enum

from services.router.openai_api.tools.tool_events import Arguments, CallBegun, Event

_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id")
_BLANK = " \t\r\n"


class ObjectScanner:
    """Follows one JSON value's brackets, from its first character on."""

    __slots__ = ("_escaped", "depth", "in_string")

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False

    def feed(self, char: str) -> None:
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self.in_string = False
        elif char == '"':
            self.in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1


class _Expects(Enum):
    KEY = 1
    COLON = 2
    VALUE = 3
    COMMA = 4


class CallScanner:
    """One call written as an object. Feed it from the `{` on, until it is done or broken."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.text = ""
        """All that was fed."""
        self.is_done = False
        self.is_broken = False
        """It is no call; nothing was emitted of it."""
        self.has_begun = False
        self._scanner = ObjectScanner()
        self._expects = _Expects.KEY
        self._key = ""
        self._start = -1
        """Where the key or value at work begins."""
        self._name: str | None = None
        self._arguments_at: tuple[int, int | None] | None = None
        self._num_sent = 0

    def feed(self, text: str) -> tuple[list[Event], str]:
        """What became certain, and the rest of `text` behind the object."""
        num_before = len(self.text)
        self.text += text
        for at, char in enumerate(text, start=num_before):
            self._step(char, at)
            if self.is_done or self.is_broken:
                self.text = self.text[: at + 1]
                return self._news(), text[at + 1 - num_before :]
        return self._news(), ""

    def _step(self, char: str, at: int) -> None:
        scanner = self._scanner
        was_in_string, was_depth = scanner.in_string, scanner.depth
        scanner.feed(char)
        if was_depth == 0:
            self.is_broken = char != "{"
            return
        if self._start >= 0:
            self._go_on(char, at, was_in_string, was_depth)
            return
        if char in _BLANK:
            return
        match self._expects:
            case _Expects.KEY if char == '"':
                self._start = at
            case _Expects.KEY if char == "}":
                self._end()
            case _Expects.COLON if char == ":":
                self._expects = _Expects.VALUE
            case _Expects.VALUE if char not in ",}]:":
                self._begin_value(at)
            case _Expects.COMMA if char == ",":
                self._expects = _Expects.KEY
            case _Expects.COMMA if char == "}":
                self._end()
            case _:
                self._break()

    def _go_on(self, char: str, at: int, was_in_string: bool, was_depth: int) -> None:
        """Inside a key or a value of the object itself."""
        scanner = self._scanner
        if self._expects is _Expects.KEY:
            if not scanner.in_string:
                self._key = _loaded(self.text[self._start : at + 1]) or ""
                self._start, self._expects = -1, _Expects.COLON
                if self._key not in (*_NAME_KEYS, *_ARGUMENT_KEYS, *_OTHER_KEYS):
                    self._break()
            return
        if was_in_string or scanner.in_string or was_depth > 1 or scanner.depth > 1:
            closes = scanner.depth == 1 and not scanner.in_string and char in '"}]'
            if closes:
                self._end_value(at + 1)
            return
        if char in ",}":
            # A number or a word ends where the next thing begins.
            self._end_value(at)
            self._expects = _Expects.KEY
            if char == "}":
                self._end()

    def _begin_value(self, at: int) -> None:
        self._start = at
        if self._key in _ARGUMENT_KEYS and self._arguments_at is None:
            self._arguments_at = (at, None)

    def _end_value(self, end: int) -> None:
        value = self.text[self._start : end]
        if self._key in _NAME_KEYS and self._name is None:
            self._name = _loaded(value) or None
            if self._name is None:
                self._break()
        elif self._arguments_at is not None and self._arguments_at[0] == self._start:
            self._arguments_at = (self._start, end)
        self._start, self._expects = -1, _Expects.COMMA

    def _end(self) -> None:
        self.is_done = self._name is not None
        self.is_broken = self._name is None

    def _break(self) -> None:
        """Once a call has begun, what is odd behind its name is let pass."""
        if not self.has_begun and self._name is None:
            self.is_broken = True
        elif self._scanner.depth <= 0:
            self.is_done = True

    def _news(self) -> list[Event]:
        if self._name is None or self.is_broken:
            return []
        events: list[Event] = []
        if not self.has_begun:
            self.has_begun = True
            events.append(CallBegun(self._index, self._name))
        fresh = self._fresh_arguments()
        if fresh:
            self._num_sent += len(fresh)
            events.append(Arguments(self._index, fresh))
        return events

    def _fresh_arguments(self) -> str:
        if self._arguments_at is None:
            return "{}" if self.is_done and not self._num_sent else ""
        start, end = self._arguments_at
        if self.text[start] != '"':
            return self.text[start + self._num_sent : end]
        # Arguments as JSON in a string: shown as what the string holds, once it is whole.
        if end is None or self._num_sent:
            return ""
        return _loaded(self.text[start:end]) or "{}"


def _loaded(text: str) -> str | None:
    """The string that `text` is in JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
