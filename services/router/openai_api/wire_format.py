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
from services.router.requests.generation import Usage

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


class WireFormat(Protocol):
    """One route's bytes. Stateful over one stream."""

    def opening(self, index: int) -> bytes:
        """Sent before the first text of a choice."""
        ...

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes: ...

    def finish(self, index: int, reason: FinishReason, stop_reason: str | int | None) -> bytes: ...

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
        self._chunk = _ChunkWriter(frame, "chat.completion.chunk")

    def opening(self, index: int) -> bytes:
        return self._chunk.write(index, b'"delta":{"role":"assistant","content":""}', b"null")

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        entries = b"null"
        if self._frame.num_top_logprobs is not None:
            entries = orjson.dumps(self._logprobs(logprobs))
        return self._chunk.write(index, b'"delta":{"content":' + orjson.dumps(text) + b"}", entries)

    def finish(self, index: int, reason: FinishReason, stop_reason: str | int | None) -> bytes:
        return self._chunk.write(index, b'"delta":{}', b"null", reason, stop_reason)

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
        self._chunk = _ChunkWriter(frame, "text_completion")
        self._offsets: dict[int, int] = {}
        """Characters of each choice whose log-probabilities have been written."""

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        entries = b"null"
        if self._frame.num_top_logprobs is not None:
            entries = orjson.dumps(self._logprobs(index, logprobs))
        return self._chunk.write(index, b'"text":' + orjson.dumps(text), entries)

    def finish(self, index: int, reason: FinishReason, stop_reason: str | int | None) -> bytes:
        return self._chunk.write(index, b'"text":""', b"null", reason, stop_reason)

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

    def __init__(self, frame: Frame, object_name: str) -> None:
        head = {
            "id": frame.response_id,
            "object": object_name,
            "created": frame.created_s,
            "model": frame.model,
        }
        self._start = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._end = (b'}],"usage":null}' if frame.include_usage else b"}]}") + b"\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null' + self._end

    def write(
        self,
        index: int,
        payload: bytes,
        logprobs: bytes,
        reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> bytes:
        start = b'%b{"index":%d,%b' % (self._start, index, payload)
        if reason is None and logprobs == b"null":
            return start + self._plain_end
        finish = b"null"
        if reason is not None:
            finish = orjson.dumps(finish_name(reason))
            finish += b',"stop_reason":' + orjson.dumps(stop_reason)
        return b'%b,"logprobs":%b,"finish_reason":%b%b' % (start, logprobs, finish, self._end)

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._start, orjson.dumps(usage_object(usage)))


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
