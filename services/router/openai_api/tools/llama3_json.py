"""Calls as Llama 3 writes them: an answer that is one object, or several with semicolons between.

<|python_tag|>{"name": "look_up", "parameters": {"word": "lease"}}; {"name": ...}
"""

from __future__ import annotations

from enum import Enum

from services.router.openai_api.tools.json_scanner import CallScanner
from services.router.openai_api.tools.tool_events import Event, Text

TAG = "<|python_tag|>"
_BETWEEN = ";, \t\r\n"


class _State(Enum):
    START = 1
    CALLS = 2
    TEXT = 3


class Llama3JsonParser:
    def __init__(self) -> None:
        self._state = _State.START
        self._held = ""
        """At the start, or between calls."""
        self._scanner: CallScanner | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            text = self._step(text, events)
        return events

    def finish(self) -> list[Event]:
        scanner = self._scanner
        rest = self._held
        if scanner is not None and not scanner.has_begun:
            rest += scanner.text
        self._held = ""
        return [Text(rest)] if rest and (not self._num_calls or rest.strip(_BETWEEN)) else []

    def _step(self, text: str, events: list[Event]) -> str:
        if self._scanner is not None:
            return self._follow(self._scanner, text, events)
        if self._state is _State.TEXT:
            events.append(Text(text))
            return ""
        self._held += text
        start = self._held.lstrip(_BETWEEN if self._num_calls else None)
        if self._state is _State.START and start.startswith(TAG):
            start = start.removeprefix(TAG).lstrip()
        if not start or (self._state is _State.START and TAG.startswith(start)):
            return ""
        if start.startswith("{"):
            self._held = self._held[: len(self._held) - len(start)]
            self._state = _State.CALLS
            self._scanner = CallScanner(self._num_calls)
            return start
        self._state = _State.TEXT
        shown, self._held = self._held, ""
        return shown

    def _follow(self, scanner: CallScanner, text: str, events: list[Event]) -> str:
        found, rest = scanner.feed(text)
        events += found
        if scanner.is_broken:
            self._scanner, self._state = None, _State.TEXT
            events.append(Text(self._held + scanner.text))
            self._held = ""
        elif scanner.is_done:
            self._scanner, self._held = None, ""
            self._num_calls += 1
        return rest
