"""What POST /v1/chat/completions writes: text, and the tool calls found in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from baton.core.request import FinishReason, TokenLogprobs
from services.router.openai_api.logprobs import chat_entries
from services.router.openai_api.tool_plan import ToolPlan
from services.router.openai_api.tools.tool_events import (
    Arguments,
    CallBegun,
    Event,
    Text,
    ToolParser,
    joined,
)
from services.router.openai_api.wire_format import (
    Choice,
    ChunkWriter,
    DataStream,
    Frame,
    answer_body,
    end_fields,
    finish_name,
)
from services.router.requests.generation import GenerationDelta, Usage

OPENING = b'"delta":{"role":"assistant","content":""}'


@dataclass(slots=True)
class _Calls:
    """What has been found in the output of one choice."""

    parser: ToolParser
    num_calls: int = 0


class ChatFormat(DataStream):
    """A `WireFormat`."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._chunk = ChunkWriter(frame, "chat.completion.chunk", (b'"delta":{"content":', b"}"))
        self._calls: dict[int, _Calls] = {}
        """By choice."""

    def opening(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        return self._chunk.write(index, OPENING, on_top=self._prompt_ids(), usage=usage)

    def text(self, index: int, text: str) -> bytes:
        return self._chunk.text(index, text)

    def detailed(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        if not self._frame.tools.is_on:
            payloads = [_content(delta.text)] if delta.text else []
        else:
            payloads = self._payloads(index, self._calls_of(index).parser.push(delta.text))
        return self._chunks(index, payloads, delta, usage)

    def finish(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        before, has_calls = b"", False
        if self._frame.tools.is_on:
            calls = self._calls_of(index)
            payloads = self._payloads(index, calls.parser.finish())
            before = b"".join(self._chunk.write(index, p, usage=usage) for p in payloads)
            has_calls = calls.num_calls > 0
        return before + self._chunk.write(
            index,
            b'"delta":{}',
            finish=orjson.dumps(_finish_name(self._frame.tools, delta, has_calls=has_calls)),
            in_choice=end_fields(delta),
            usage=usage,
        )

    def usage(self, usage: Usage) -> bytes:
        return self._chunk.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        entries = [self._choice(choice) for choice in choices]
        prompt_logprobs = choices[0].prompt_logprobs if choices else ()
        on_top = {**self._frame.prompt_field(prompt_logprobs), **self._prompt_ids()}
        return answer_body(self._frame, "chat.completion", entries, usage, on_top)

    def _choice(self, choice: Choice) -> dict[str, object]:
        frame = self._frame
        message: dict[str, object] = {
            "role": "assistant",
            "content": choice.text,
            "refusal": None,
        }
        if frame.tools.is_on:
            message |= message_fields(frame.tools, choice.text)
        entry: dict[str, object] = {
            "index": choice.index,
            "message": message,
            "logprobs": None if frame.num_top_logprobs is None else self._logprobs(choice.logprobs),
            "finish_reason": _finish_name(frame.tools, choice, has_calls="tool_calls" in message),
            **end_fields(choice),
        }
        if frame.returns_token_ids:
            entry["token_ids"] = choice.token_ids
        return entry

    def _chunks(
        self, index: int, payloads: Sequence[bytes], delta: GenerationDelta, usage: Usage | None
    ) -> bytes:
        """The first chunk has what belongs to the tokens; there is one even without text."""
        frame = self._frame
        has_logprobs = frame.num_top_logprobs is not None and bool(delta.logprobs)
        if not payloads:
            if not has_logprobs and not (frame.returns_token_ids and delta.token_ids):
                return b""
            payloads = [_content("")]
        first = self._chunk.write(
            index,
            payloads[0],
            logprobs=orjson.dumps(self._logprobs(delta.logprobs)) if has_logprobs else b"null",
            in_choice={"token_ids": delta.token_ids} if frame.returns_token_ids else None,
            usage=usage,
        )
        return first + b"".join(self._chunk.write(index, p, usage=usage) for p in payloads[1:])

    def _payloads(self, index: int, events: Iterable[Event]) -> list[bytes]:
        calls, plan = self._calls_of(index), self._frame.tools
        payloads = []
        for event in joined(list(events)):
            if isinstance(event, Text):
                payloads.append(_content(event.text))
                continue
            if event.call and not plan.is_parallel:
                continue
            if isinstance(event, CallBegun):
                calls.num_calls += 1
            payloads.append(_call_delta(plan, event))
        return payloads

    def _calls_of(self, index: int) -> _Calls:
        calls = self._calls.get(index)
        if calls is None:
            calls = self._calls[index] = _Calls(self._frame.tools.parser())
        return calls

    def _prompt_ids(self) -> dict[str, object]:
        if not self._frame.returns_token_ids:
            return {}
        return {"prompt_token_ids": self._frame.prompt_of(0).token_ids}

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, object]:
        num_top = self._frame.num_top_logprobs or 0
        return {"content": chat_entries(self._frame.names, logprobs, num_top), "refusal": None}


def message_fields(plan: ToolPlan, text: str) -> dict[str, object]:
    """`content` and, if there are any, `tool_calls` of a whole answer."""
    parser = plan.parser()
    events = [*parser.push(text), *parser.finish()]
    content = "".join(event.text for event in events if isinstance(event, Text))
    calls: list[dict[str, object]] = []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, Text) or (event.call and not plan.is_parallel):
            continue
        if isinstance(event, CallBegun):
            arguments.append([])
            calls.append(
                {"id": plan.new_call_id(), "type": "function", "function": {"name": event.name}}
            )
        else:
            arguments[event.call].append(event.text)
    if not calls:
        return {"content": content}
    for call, parts in zip(calls, arguments, strict=True):
        call["function"] = {**_object(call["function"]), "arguments": "".join(parts)}
    return {"content": content or None, "tool_calls": calls}


def _object(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value


def _content(text: str) -> bytes:
    return b'"delta":{"content":' + orjson.dumps(text) + b"}"


def _call_delta(plan: ToolPlan, event: CallBegun | Arguments) -> bytes:
    entry: dict[str, object]
    if isinstance(event, CallBegun):
        entry = {
            "index": event.call,
            "id": plan.new_call_id(),
            "type": "function",
            "function": {"name": event.name, "arguments": ""},
        }
    else:
        entry = {"index": event.call, "function": {"arguments": event.text}}
    return b'"delta":' + orjson.dumps({"tool_calls": [entry]})


def _finish_name(plan: ToolPlan, end: GenerationDelta | Choice, *, has_calls: bool) -> str:
    if has_calls and plan.names_finish and end.finish_reason is FinishReason.STOP:
        return "tool_calls"
    return finish_name(end.finish_reason)
