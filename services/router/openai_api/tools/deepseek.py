"""Calls as DeepSeek V3 and R1 (first form) and V3.1 (second) write them, in special tokens:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up
```json
{"word": "lease"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜>
<｜tool▁call▁begin｜>look_up<｜tool▁sep｜>{"word": "lease"}<｜tool▁call▁end｜>
"""

from __future__ import annotations

from enum import Enum

from services.router.openai_api.tools.json_scanner import ObjectScanner
from services.router.openai_api.tools.text_gate import TextGate
from services.router.openai_api.tools.tool_events import Arguments, CallBegun, Event, Text

# The bars and the low lines are not those of ASCII.
ALL_BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
ALL_END = "<\uff5ctool\u2581calls\u2581end\uff5c>"
BEGIN = "<\uff5ctool\u2581call\u2581begin\uff5c>"
SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
END = "<\uff5ctool\u2581call\u2581end\uff5c>"
_MAX_HEAD_CHARS = 512


class _State(Enum):
    TEXT = 1
    HEAD = 2
    """From the begin of a call to its arguments."""
    ARGUMENTS = 3
    TAIL = 4
    """From there to the end of the call."""


class DeepseekParser:
    def __init__(self) -> None:
        self._gate = TextGate(ALL_BEGIN, ALL_END, BEGIN)
        self._state = _State.TEXT
        self._held = ""
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
                case _State.ARGUMENTS:
                    text = self._read_arguments(text, events)
                case _State.TAIL:
                    text = self._read_tail(text)
        return events

    def finish(self) -> list[Event]:
        rest = self._gate.finish()
        if self._state is _State.HEAD:
            rest += BEGIN + self._held
        if self._num_calls:
            rest = rest.rstrip()
        return [Text(rest)] if rest else []

    def _read_text(self, text: str, events: list[Event]) -> str:
        shown, marker, rest = self._gate.push(text)
        if shown:
            events.append(Text(shown))
        if marker == BEGIN:
            self._state, self._held = _State.HEAD, ""
        return rest

    def _read_head(self, text: str, events: list[Event]) -> str:
        self._held += text
        first, separator, second = self._held.partition(SEPARATOR)
        brace = second.find("{")
        if separator and brace >= 0:
            head = second[:brace].removesuffix("\n").removesuffix("```json")
            name = head.strip() if first.strip() == "function" and head.strip() else first.strip()
            events.append(CallBegun(self._num_calls, name))
            self._num_calls += 1
            self._state, self._arguments = _State.ARGUMENTS, ObjectScanner()
            return second[brace:]
        if len(self._held) > _MAX_HEAD_CHARS:
            events.append(Text(BEGIN + self._held))
            self._state, self._held = _State.TEXT, ""
        return ""

    def _read_arguments(self, text: str, events: list[Event]) -> str:
        for at, char in enumerate(text, start=1):
            self._arguments.feed(char)
            if self._arguments.depth <= 0 and not self._arguments.in_string:
                events.append(Arguments(self._num_calls - 1, text[:at]))
                self._state, self._held = _State.TAIL, ""
                return text[at:]
        events.append(Arguments(self._num_calls - 1, text))
        return ""

    def _read_tail(self, text: str) -> str:
        self._held += text
        at = self._held.find(END)
        if at < 0:
            self._held = self._held[-len(END) :]
            return ""
        self._state = _State.TEXT
        return self._held[at + len(END) :]
