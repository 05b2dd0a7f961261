"""What POST /v1/responses writes: events of a stream, each with a number, or one object.

response.created  response.in_progress
  response.output_item.added
    response.content_part.added   response.output_text.delta ...   response.output_text.done
    response.content_part.done
  response.output_item.done
  response.output_item.added   response.function_call_arguments.delta ...   .done   ...
response.completed, response.incomplete or response.failed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import orjson

from baton.core.errors import RequestCancelled
from baton.core.request import FinishReason, TokenLogprobs
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
from services.router.openai_api.logprobs import chat_entries
from services.router.openai_api.responses.envelope import Envelope, Object, Status
from services.router.openai_api.wire_format import Choice, finish_name
from services.router.requests.generation import GenerationDelta, Usage

OnEnd = Callable[[Object, Sequence[Block] | None], None]
"""Told the final response, before the client sees it, and the blocks of its output; None: it
failed."""


class ResponsesFormat:
    """A `WireFormat` of one choice."""

    def __init__(self, envelope: Envelope, now_s: Callable[[], float], on_end: OnEnd) -> None:
        """`now_s`: wall-clock time."""
        self._envelope = envelope
        self._frame = envelope.frame
        self._now_s = now_s
        self._on_end = on_end
        self._blocks = Blocks(self._frame.tools)
        self._num_events = 0
        self._ids = envelope.frame.response_id.removeprefix("resp_")

    def opening(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        response = self._envelope.response(Status.IN_PROGRESS)
        return self._event("response.created", {"response": response}) + self._event(
            "response.in_progress", {"response": response}
        )

    def text(self, index: int, text: str) -> bytes:
        return self._write(self._blocks.push(text))

    def detailed(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        return self._write(self._blocks.push(delta.text, delta.logprobs))

    def finish(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        status = _status(delta.finish_reason)
        data = self._write(self._blocks.finish(at_least_one=True), status)
        response = self._ended(status, self._blocks.blocks, delta.usage or Usage(0, 0, 0))
        return data + self._event(f"response.{status.value}", {"response": response})

    def usage(self, usage: Usage) -> bytes:
        """It is in the last event."""
        return b""

    def end(self) -> bytes:
        return b""

    def error(self, error: BaseException) -> bytes:
        return self._event("response.failed", {"response": self.failed(error)})

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        (choice,) = choices
        blocks = blocks_of(self._frame.tools, choice.text, choice.logprobs, at_least_one=True)
        return orjson.dumps(self._ended(_status(choice.finish_reason), blocks, usage))

    def failed(self, error: BaseException) -> Object:
        """The response of a generation that broke; the end is told as any other."""
        is_left = isinstance(error, RequestCancelled)
        status = Status.CANCELLED if is_left else Status.FAILED
        response = self._envelope.response(status, error=None if is_left else error)
        self._on_end(response, None)
        return response

    def _ended(self, status: Status, blocks: Sequence[Block], usage: Usage) -> Object:
        # Only the last item can have been cut off.
        last = len(blocks) - 1
        output = [
            self._item(block, status if block.index == last else Status.COMPLETED)
            for block in blocks
        ]
        done_at_s = int(self._now_s()) if status is Status.COMPLETED else None
        response = self._envelope.response(status, output, usage, completed_at_s=done_at_s)
        self._on_end(response, blocks)
        return response

    def _write(self, events: Iterable[BlockEvent], status: Status = Status.COMPLETED) -> bytes:
        """`status`: of what ends the output."""
        found = list(events)
        data = []
        for number, event in enumerate(found):
            match event:
                case Begun(block):
                    data.append(self._begun(block))
                case More(block, text, logprobs):
                    data.append(self._more(block, text, logprobs))
                case Ended(block):
                    is_last = number == len(found) - 1
                    data.append(self._block_ended(block, status if is_last else Status.COMPLETED))
        return b"".join(data)

    def _begun(self, block: Block) -> bytes:
        item = self._item(block, Status.IN_PROGRESS, is_empty=True)
        data = self._event(
            "response.output_item.added", {"output_index": block.index, "item": item}
        )
        if isinstance(block, TextBlock):
            data += self._event(
                "response.content_part.added", {**self._place(block), "part": _part("", [])}
            )
        return data

    def _more(self, block: Block, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        if isinstance(block, TextBlock):
            fields = {"delta": text, "logprobs": self._logprobs(logprobs)}
            return self._event("response.output_text.delta", {**self._place(block), **fields})
        return self._event(
            "response.function_call_arguments.delta", {**self._place(block), "delta": text}
        )

    def _block_ended(self, block: Block, status: Status) -> bytes:
        place = self._place(block)
        if isinstance(block, TextBlock):
            text, logprobs = block.text, self._logprobs(block.logprobs)
            data = self._event(
                "response.output_text.done", {**place, "text": text, "logprobs": logprobs}
            ) + self._event("response.content_part.done", {**place, "part": _part(text, logprobs)})
        else:
            data = self._event(
                "response.function_call_arguments.done",
                {**place, "name": block.name, "arguments": block.arguments},
            )
        return data + self._event(
            "response.output_item.done",
            {"output_index": block.index, "item": self._item(block, status)},
        )

    def _place(self, block: Block) -> Object:
        place: Object = {"item_id": self._item_id(block), "output_index": block.index}
        if isinstance(block, TextBlock):
            place["content_index"] = 0
        return place

    def _item_id(self, block: Block) -> str:
        kind = "msg" if isinstance(block, TextBlock) else "fc"
        return f"{kind}_{self._ids}_{block.index}"

    def _item(self, block: Block, status: Status, *, is_empty: bool = False) -> Object:
        item: Object = {"id": self._item_id(block), "status": status.value}
        if isinstance(block, TextBlock):
            part = _part(block.text, self._logprobs(block.logprobs))
            content = [] if is_empty else [part]
            return {**item, "type": "message", "role": "assistant", "content": content}
        return {
            **item,
            "type": "function_call",
            "call_id": block.call_id,
            "name": block.name,
            "arguments": "" if is_empty else block.arguments,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> list[Object]:
        frame = self._frame
        if frame.num_top_logprobs is None:
            return []
        return chat_entries(frame.names, logprobs, frame.num_top_logprobs)

    def _event(self, kind: str, fields: Object) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        data = orjson.dumps({"type": kind, "sequence_number": number, **fields})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _part(text: str, logprobs: list[Object]) -> Object:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _status(reason: FinishReason | None) -> Status:
    return Status.INCOMPLETE if finish_name(reason) == "length" else Status.COMPLETED
