"""The output of one generation as a row of blocks: text, and calls of tools.

    push(text) ──► Begun(block) More(block, text) Ended(block) Begun(block) ...

At most one block is open at a time. Does not know how an API writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import orjson

from baton.core.request import TokenLogprobs
from services.router.openai_api.tool_plan import ToolPlan
from services.router.openai_api.tools.tool_events import (
    CallBegun,
    Event,
    Text,
    joined,
)


@dataclass(slots=True)
class TextBlock:
    index: int
    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(slots=True)
class CallBlock:
    index: int
    call_id: str
    name: str
    parts: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """JSON, unless the output was cut off."""
        return "".join(self.parts)

    def arguments_object(self) -> dict[str, object]:
        """Empty where the model wrote no JSON object."""
        try:
            found = orjson.loads(self.arguments)
        except orjson.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}


Block = TextBlock | CallBlock


@dataclass(frozen=True, slots=True)
class Begun:
    block: Block


@dataclass(frozen=True, slots=True)
class More:
    block: Block
    text: str
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    block: Block


BlockEvent = Begun | More | Ended


class Blocks:
    """Of one generation. What comes of a text does not depend on the pieces it was pushed in."""

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._parser = plan.parser() if plan.is_on else None
        self._open: Block | None = None
        self._waiting: list[TokenLogprobs] = []
        """Of tokens whose text is not certain yet."""
        self.blocks: list[Block] = []

    @property
    def has_calls(self) -> bool:
        return any(isinstance(block, CallBlock) for block in self.blocks)

    def push(self, text: str, logprobs: Sequence[TokenLogprobs] = ()) -> list[BlockEvent]:
        self._waiting += logprobs
        if self._parser is not None:
            return self._take(self._parser.push(text))
        return self._take((Text(text),)) if text else []

    def finish(self, *, at_least_one: bool = False) -> list[BlockEvent]:
        """`at_least_one`: an empty output is an empty text."""
        events = [] if self._parser is None else self._take(self._parser.finish())
        if not self.blocks and at_least_one:
            events += self._begin(TextBlock(0))
        if isinstance(self._open, TextBlock):
            self._open.logprobs += self._waiting
        return events + self._end()

    def _take(self, found: Iterable[Event]) -> list[BlockEvent]:
        events: list[BlockEvent] = []
        for event in joined(list(found)):
            if isinstance(event, Text):
                events += self._text(event.text)
            elif event.call and not self._plan.is_parallel:
                continue
            elif isinstance(event, CallBegun):
                call = CallBlock(len(self.blocks), self._plan.new_call_id(), event.name)
                events += self._begin(call)
            elif self._open is not None:
                self._open.parts.append(event.text)
                events.append(More(self._open, event.text))
        return events

    def _text(self, text: str) -> list[BlockEvent]:
        events: list[BlockEvent] = []
        block = self._open
        if not isinstance(block, TextBlock):
            block = TextBlock(len(self.blocks))
            events += self._begin(block)
        logprobs, self._waiting = self._waiting, []
        block.parts.append(text)
        block.logprobs += logprobs
        return [*events, More(block, text, logprobs)]

    def _begin(self, block: Block) -> list[BlockEvent]:
        events = self._end()
        self._open = block
        self.blocks.append(block)
        return [*events, Begun(block)]

    def _end(self) -> list[BlockEvent]:
        if self._open is None:
            return []
        ended, self._open = self._open, None
        return [Ended(ended)]


def blocks_of(
    plan: ToolPlan, text: str, logprobs: Sequence[TokenLogprobs] = (), *, at_least_one: bool = False
) -> list[Block]:
    """Of a whole output."""
    blocks = Blocks(plan)
    blocks.push(text, logprobs)
    blocks.finish(at_least_one=at_least_one)
    return blocks.blocks
