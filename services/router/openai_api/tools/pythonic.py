"""Calls as Llama 4 and others write them, a list of Python calls that is the whole answer:

[look_up(word="lease"), add(a=1, b=2)]
"""

from __future__ import annotations

import ast
import json
import re

from services.router.openai_api.tools.tool_events import Arguments, CallBegun, Event, Text

_MAY_BE_CALLS = re.compile(
    r"\s*(<\|python_start\|>\s*)?(\[\s*([A-Za-z_][\w.]*\s*(\(.*)?)?)?", re.DOTALL
)
_START, _END = "<|python_start|>", "<|python_end|>"
_WORDS = {"true": True, "false": False, "null": None}
MAX_CALL_CHARS = 64 << 10


class PythonicParser:
    """Shows nothing before the end as long as the answer may be calls."""

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False
        self._has_name = False
        """A call has begun, and more cannot be told before the end."""

    def push(self, text: str) -> list[Event]:
        if self._is_text:
            return [Text(text)] if text else []
        self._held += text
        if self._has_name and len(self._held) <= MAX_CALL_CHARS:
            return []
        may_be = _MAY_BE_CALLS.fullmatch(self._held) or _START.startswith(self._held.lstrip())
        if may_be and len(self._held) <= MAX_CALL_CHARS:
            self._has_name = "(" in self._held
            return []
        self._is_text = True
        return self._release()

    def finish(self) -> list[Event]:
        calls = _calls(self._held)
        if calls is None:
            return self._release()
        self._held = ""
        events: list[Event] = []
        for index, (name, arguments) in enumerate(calls):
            events += [CallBegun(index, name), Arguments(index, arguments)]
        return events

    def _release(self) -> list[Event]:
        text, self._held = self._held, ""
        return [Text(text)] if text else []


def _calls(text: str) -> list[tuple[str, str]] | None:
    """Names and arguments as JSON; None for what is not a list of calls."""
    source = text.strip().removeprefix(_START).removesuffix(_END).strip()
    try:
        body = ast.parse(source, mode="eval").body
        if not isinstance(body, ast.List) or not body.elts:
            return None
        return [_call(node) for node in body.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> tuple[str, str]:
    """Raises ValueError."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments must have names")
        arguments[keyword.arg] = _value(keyword.value)
    return ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)


def _value(node: ast.expr) -> object:
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return value
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=entries) | ast.Tuple(elts=entries):
            return [_value(entry) for entry in entries]
        case ast.Dict(keys=keys, values=values):
            return {
                str(_value(key)): _value(value)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
    raise ValueError("not a plain value")
