"""What the two generation routes write: stream chunks as bytes, whole answers as objects.

Everything that is the same in all chunks of a stream is serialized once, so a chunk costs one
call to the JSON encoder for its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from baton.core.errors import InternalError
from baton.core.request import FinishReason, TokenLogprobs
from baton.engine.tokenizer import Tokenizer
from services.router.openai_api.logprobs import (
    CompletionLogprobs,
    chat_entries,
    completion_entries,
)
from services.router.requests.generation import GenerationDelta, Usage
from services.router.requests.timing import RequestTiming

DONE = b"data: [DONE]\n\n"

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Frame:
    """The same in every chunk and in the answer of one request."""

    response_id: str
    model: str
    created_s: int
    tokenizer: Tokenizer
    num_top_logprobs: int | None
    """None: no log-probabilities."""
    include_usage: bool
    """In a stream: a usage chunk at the end, and a null usage in the others."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished generation."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprobs]
    finish_reason: FinishReason
    stop_reason: str | int | None
    timing: RequestTiming | None = None
    """If it was asked for."""


class WireFormat(Protocol):
    """One route's bytes. Stateful over one stream."""

    def opening(self, index: int) -> bytes:
        """Sent before the first text of a choice."""
        ...

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes: ...

    def finish(self, index: int, delta: GenerationDelta) -> bytes:
        """The end of a choice; `delta` has its finish reason."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The last chunk before DONE, with no choices."""
        ...

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""
        ...


class ChatFormat:
    """POST /v1/chat/completions."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._chunk = _ChunkWriter(frame, "chat.completion.chunk", (b'"delta":{"content":', b"}"))

    def opening(self, index: int) -> bytes:
        return self._chunk.write(index, b'"delta":{"role":"assistant","content":""}', b"null")

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        if self._frame.num_top_logprobs is None:
            return self._chunk.text(index, text)
        content = b'"delta":{"content":' + orjson.dumps(text) + b"}"
        return self._chunk.write(index, content, orjson.dumps(self._logprobs(logprobs)))

    def finish(self, index: int, delta: GenerationDelta) -> bytes:
        return self._chunk.write(index, b'"delta":{}', b"null", delta)

    def usage(self, usage: Usage) -> bytes:
        return self._chunk.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        has_logprobs = self._frame.num_top_logprobs is not None
        entries: list[dict[str, object]] = [
            {
                "index": c.index,
                "message": {"role": "assistant", "content": c.text, "refusal": None},
                "logprobs": self._logprobs(c.logprobs) if has_logprobs else None,
                "finish_reason": finish_name(c.finish_reason),
                "stop_reason": c.stop_reason,
                **_own_fields(c.timing),
            }
            for c in choices
        ]
        return _answer(self._frame, "chat.completion", entries, usage)

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, object]:
        num_top = self._frame.num_top_logprobs or 0
        return {
            "content": chat_entries(self._frame.tokenizer, logprobs, num_top),
            "refusal": None,
        }


class CompletionFormat:
    """POST /v1/completions."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._chunk = _ChunkWriter(frame, "text_completion", (b'"text":', b""))
        self._offsets: dict[int, int] = {}
        """Characters of each choice whose log-probabilities have been written."""

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        if self._frame.num_top_logprobs is None:
            return self._chunk.text(index, text)
        entries = orjson.dumps(self._logprobs(index, logprobs))
        return self._chunk.write(index, b'"text":' + orjson.dumps(text), entries)

    def finish(self, index: int, delta: GenerationDelta) -> bytes:
        return self._chunk.write(index, b'"text":""', b"null", delta)

    def usage(self, usage: Usage) -> bytes:
        return self._chunk.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        has_logprobs = self._frame.num_top_logprobs is not None
        entries: list[dict[str, object]] = [
            {
                "index": c.index,
                "text": c.text,
                "logprobs": self._logprobs(c.index, c.logprobs) if has_logprobs else None,
                "finish_reason": finish_name(c.finish_reason),
                "stop_reason": c.stop_reason,
                **_own_fields(c.timing),
            }
            for c in choices
        ]
        return _answer(self._frame, "text_completion", entries, usage)

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        num_top = self._frame.num_top_logprobs or 0
        arrays, self._offsets[index] = completion_entries(
            self._frame.tokenizer, logprobs, num_top, self._offsets.get(index, 0)
        )
        return arrays


class _ChunkWriter:
    """Puts one choice between the parts that never change."""

    def __init__(self, frame: Frame, object_name: str, around: tuple[bytes, bytes]) -> None:
        """`around`: what stands before and after the text of a choice."""
        head = {
            "id": frame.response_id,
            "object": object_name,
            "created": frame.created_s,
            "model": frame.model,
        }
        self._start = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._end = (b'}],"usage":null}' if frame.include_usage else b"}]}") + b"\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null' + self._end
        self._around = around
        self._text_end = around[1] + self._plain_end
        self._text_starts: dict[int, bytes] = {}
        """By choice."""

    def text(self, index: int, text: str) -> bytes:
        """A chunk with nothing but text, which is nearly every one."""
        start = self._text_starts.get(index)
        if start is None:
            start = b'%b{"index":%d,%b' % (self._start, index, self._around[0])
            self._text_starts[index] = start
        return start + orjson.dumps(text) + self._text_end

    def write(
        self,
        index: int,
        payload: bytes,
        logprobs: bytes,
        last: GenerationDelta | None = None,
    ) -> bytes:
        """`last`: the delta that ends the choice."""
        start = b'%b{"index":%d,%b' % (self._start, index, payload)
        if last is None and logprobs == b"null":
            return start + self._plain_end
        finish = b"null"
        if last is not None and last.finish_reason is not None:
            finish = orjson.dumps(finish_name(last.finish_reason))
            finish += b',"stop_reason":' + orjson.dumps(last.stop_reason)
            if last.timing is not None:
                finish += b"," + orjson.dumps(_own_fields(last.timing))[1:-1]
        return b'%b,"logprobs":%b,"finish_reason":%b%b' % (start, logprobs, finish, self._end)

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._start, orjson.dumps(usage_object(usage)))


def _own_fields(timing: RequestTiming | None) -> dict[str, object]:
    """What a choice has beyond the OpenAI API; nothing unless the client asked for it."""
    return {} if timing is None else {"baton": {"timing": timing}}


def finish_name(reason: FinishReason) -> str:
    """Raises InternalError for reasons that the dispatcher reports as errors instead."""
    name = _FINISH.get(reason)
    if name is None:
        raise InternalError(f"the generation ended as {reason.value} without saying why")
    return name


def usage_object(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _answer(
    frame: Frame, object_name: str, choices: list[dict[str, object]], usage: Usage
) -> bytes:
    return orjson.dumps(
        {
            "id": frame.response_id,
            "object": object_name,
            "created": frame.created_s,
            "model": frame.model,
            "choices": choices,
            "usage": usage_object(usage),
        }
    )
