"""What POST /v1/messages writes: events of a stream, or one message.

message_start  ping
  content_block_start   content_block_delta ...   content_block_stop    for each block
message_delta  message_stop
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import orjson

from services.router.openai_api.blocks import (
    Begun,
    Block,
    BlockEvent,
    Blocks,
    Ended,
    More,
    TextBlock,
    blocks_of,
)
from services.router.openai_api.messages.message_errors import message_error
from services.router.openai_api.wire_format import Choice, Frame, finish_name
from services.router.requests.generation import GenerationDelta, Usage

Object = dict[str, object]


class MessagesFormat:
    """A `WireFormat` of one choice."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._blocks = Blocks(frame.tools)

    def opening(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        num_prompt_tokens = len(self._frame.prompt_of(0).token_ids)
        message = self._message([], None, None, Usage(num_prompt_tokens, 0, 0))
        return _event("message_start", {"message": message}) + _event("ping", {})

    def text(self, index: int, text: str) -> bytes:
        return _written(self._blocks.push(text))

    def detailed(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        return _written(self._blocks.push(delta.text))

    def finish(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        data = _written(self._blocks.finish())
        end = {
            "stop_reason": _stop_reason(delta, has_calls=self._blocks.has_calls),
            "stop_sequence": _stop_sequence(delta),
        }
        fields: Object = {"delta": end, "usage": usage_object(delta.usage or Usage(0, 0, 0))}
        return data + _event("message_delta", fields) + _event("message_stop", {})

    def usage(self, usage: Usage) -> bytes:
        """It is in an event before."""
        return b""

    def end(self) -> bytes:
        return b""

    def error(self, error: BaseException) -> bytes:
        return b"event: error\ndata: %b\n\n" % message_error(error).body

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        (choice,) = choices
        blocks = blocks_of(self._frame.tools, choice.text)
        has_calls = any(not isinstance(block, TextBlock) for block in blocks)
        stop_reason = _stop_reason(choice, has_calls=has_calls)
        content = [_content(block) for block in blocks]
        return orjson.dumps(self._message(content, stop_reason, _stop_sequence(choice), usage))

    def _message(
        self,
        content: list[Object],
        stop_reason: str | None,
        stop_sequence: str | None,
        usage: Usage,
    ) -> Object:
        return {
            "id": self._frame.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._frame.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage_object(usage),
        }


def usage_object(usage: Usage) -> Object:
    """Cached tokens are counted apart, as in that API."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _written(events: Iterable[BlockEvent]) -> bytes:
    data = []
    for event in events:
        match event:
            case Begun(block):
                content = _content(block, is_empty=True)
                fields: Object = {"index": block.index, "content_block": content}
                data.append(_event("content_block_start", fields))
            case More(block, text):
                kind, name = ("input_json_delta", "partial_json")
                if isinstance(block, TextBlock):
                    kind, name = ("text_delta", "text")
                fields = {"index": block.index, "delta": {"type": kind, name: text}}
                data.append(_event("content_block_delta", fields))
            case Ended(block):
                data.append(_event("content_block_stop", {"index": block.index}))
    return b"".join(data)


def _content(block: Block, *, is_empty: bool = False) -> Object:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": "" if is_empty else block.text}
    arguments = {} if is_empty else block.arguments_object()
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments}


def _stop_reason(end: GenerationDelta | Choice, *, has_calls: bool) -> str:
    if finish_name(end.finish_reason) == "length":
        return "max_tokens"
    if has_calls:
        return "tool_use"
    return "end_turn" if _stop_sequence(end) is None else "stop_sequence"


def _stop_sequence(end: GenerationDelta | Choice) -> str | None:
    return end.stop_reason if isinstance(end.stop_reason, str) else None


def _event(kind: str, fields: Object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))
