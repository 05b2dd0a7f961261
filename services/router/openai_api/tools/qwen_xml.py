"""Calls as Qwen's coding models write them, in tags all through:

<tool_call>
<function=look_up>
<parameter=word>
lease
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from services.router.openai_api.tools.text_gate import TextGate
from services.router.openai_api.tools.tool_events import Arguments, CallBegun, Event, Text

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]{1,128})>(.*?)(?:</function>\s*)?", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\s]{1,128})>\n?(.*?)\n?(?=</parameter>|<parameter=|\Z)", re.DOTALL
)
MAX_CALL_CHARS = 256 << 10


class QwenXmlParser:
    """Shows a call once it is whole: what its values are is known from the tools."""

    def __init__(self, parameters: Mapping[str, Mapping[str, object]]) -> None:
        """`parameters`: each tool's properties, by name."""
        self._parameters = parameters
        self._gate = TextGate(OPEN)
        self._held: str | None = None
        """Inside a call."""
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._held is None:
                shown, marker, text = self._gate.push(text)
                if shown:
                    events.append(Text(shown))
                if marker is not None:
                    self._held = ""
                continue
            self._held += text
            inner, close, text = self._held.partition(CLOSE)
            if close:
                self._held = None
                events += self._call(inner)
            elif len(inner) > MAX_CALL_CHARS:
                self._held = None
                events.append(Text(OPEN + inner))
            else:
                text = ""
        return events

    def finish(self) -> list[Event]:
        rest = self._gate.finish()
        if self._held is not None:
            rest += OPEN + self._held
        if self._num_calls:
            rest = rest.rstrip()
        return [Text(rest)] if rest else []

    def _call(self, inner: str) -> list[Event]:
        found = _FUNCTION.fullmatch(inner)
        if found is None:
            return [Text(OPEN + inner + CLOSE)]
        name, body = found[1], found[2]
        properties = self._parameters.get(name, {})
        values = {key: _value(text, properties.get(key)) for key, text in _PARAMETER.findall(body)}
        index = self._num_calls
        self._num_calls += 1
        arguments = json.dumps(values, ensure_ascii=False)
        return [CallBegun(index, name), Arguments(index, arguments)]


def _value(text: str, schema: object) -> object:
    """Text unless the tool's schema has another type for it."""
    kind = schema.get("type", "string") if isinstance(schema, Mapping) else "string"
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
