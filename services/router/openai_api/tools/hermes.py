"""Calls as Hermes and Qwen write them, each in a tag of its own:

<tool_call>
{"name": "look_up", "arguments": {"word": "lease"}}
</tool_call>
"""

from __future__ import annotations

from services.router.openai_api.tools.json_scanner import CallScanner
from services.router.openai_api.tools.text_gate import TextGate
from services.router.openai_api.tools.tool_events import Event, Text

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    def __init__(self) -> None:
        self._gate = TextGate(OPEN)
        self._blank = ""
        """Between a tag and what it holds."""
        self._scanner: CallScanner | None = None
        self._is_closing = False
        self._tail = ""
        """Behind a call, before its closing tag."""
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._is_closing:
                text = self._close(text)
            elif self._scanner is not None:
                text = self._follow(self._scanner, text, events)
            else:
                shown, marker, text = self._gate.push(text)
                if shown:
                    events.append(Text(shown))
                if marker is not None:
                    self._scanner = CallScanner(self._num_calls)
        return events

    def finish(self) -> list[Event]:
        scanner = self._scanner
        if scanner is not None and not scanner.has_begun and not self._is_closing:
            self._gate.put_back(OPEN + self._blank + scanner.text)
        elif self._num_calls or scanner is not None:
            rest = self._gate.finish().rstrip()
            return [Text(rest)] if rest else []
        rest = self._gate.finish()
        return [Text(rest)] if rest else []

    def _follow(self, scanner: CallScanner, text: str, events: list[Event]) -> str:
        if not scanner.text:
            stripped = text.lstrip()
            self._blank += text[: len(text) - len(stripped)]
            text = stripped
        if not text:
            return ""
        found, rest = scanner.feed(text)
        events += found
        if scanner.is_broken:
            self._scanner = None
            broken, self._blank = OPEN + self._blank + scanner.text, ""
            events.append(Text(broken))
        elif scanner.is_done:
            self._num_calls += 1
            self._is_closing, self._blank, self._tail = True, "", ""
        return rest

    def _close(self, text: str) -> str:
        """Whatever stands before the closing tag is dropped, a superfluous bracket for example."""
        self._tail += text
        at = self._tail.find(CLOSE)
        opened = self._tail.find(OPEN)
        if at < 0 and opened < 0:
            self._tail = self._tail[-len(CLOSE) :]
            return ""
        rest = self._tail[opened:] if at < 0 or 0 <= opened < at else self._tail[at + len(CLOSE) :]
        self._scanner, self._is_closing, self._tail = None, False, ""
        return rest
