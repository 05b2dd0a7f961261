"""What a parser of tool calls finds in a model's output, in the order of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """For the reader; never empty."""

    text: str


class CallBegun(NamedTuple):
    """Call number `call` of this answer, from 0 on."""

    call: int
    name: str


class Arguments(NamedTuple):
    """More of a call's arguments; together they are JSON as the model wrote it."""

    call: int
    text: str


Event = Text | CallBegun | Arguments


class ToolParser(Protocol):
    """Of one answer."""

    def push(self, text: str) -> Sequence[Event]:
        """What became certain with `text`."""
        ...

    def finish(self) -> Sequence[Event]:
        """The output has ended: what was held back. A call that did not become one is text."""
        ...


def joined(events: Sequence[Event]) -> list[Event]:
    """The same with neighbours of one kind made one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + event.text)
        elif (
            isinstance(event, Arguments) and isinstance(last, Arguments) and last.call == event.call
        ):
            merged[-1] = Arguments(event.call, last.text + event.text)
        else:
            merged.append(event)
    return merged
