"""What the two generation routes have in common in what they write.

Everything that is the same in all chunks of a stream is serialized once, so a chunk costs one
call to the JSON encoder for its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from baton.core.errors import InternalError
from baton.core.request import FinishReason, TokenLogprobs
from baton.engine.tokenizer import Tokenizer
from services.router.openai_api.error_body import error_answer
from services.router.openai_api.logprobs import TokenNames, prompt_entries
from services.router.openai_api.tool_plan import NO_TOOLS, ToolPlan
from services.router.requests.generation import GenerationDelta, Usage
from services.router.requests.timing import RequestTiming

DONE = b"data: [DONE]\n\n"

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: tuple[int, ...] = ()
    text: str | None = None
    """As the client sent it; None for token ids and conversations, and for what was cut."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The same in every chunk and in the answer of one request."""

    response_id: str
    model: str
    created_s: int
    tokenizer: Tokenizer
    num_top_logprobs: int | None = None
    """None: no log-probabilities."""
    include_usage: bool = False
    """In a stream: a usage chunk at the end, and a null usage in the others."""
    continuous_usage: bool = False
    """In a stream: a usage in every chunk."""
    num_choices: int = 1
    """Of each prompt."""
    prompts: Sequence[Prompt] = ()
    echo: bool = False
    """The text begins with the prompt."""
    drops_output: bool = False
    """And is nothing else."""
    num_prompt_logprobs: int | None = None
    """In a field of their own."""
    returns_token_ids: bool = False
    names_are_ids: bool = False
    skip_special_tokens: bool = True
    tools: ToolPlan = field(default=NO_TOOLS)

    @property
    def is_plain(self) -> bool:
        """Chunks have text and nothing beside it."""
        return not (
            self.num_top_logprobs is not None
            or self.continuous_usage
            or self.returns_token_ids
            or self.drops_output
            or self.tools.is_on
        )

    @property
    def names(self) -> TokenNames:
        return TokenNames(self.tokenizer, self.names_are_ids)

    def prompt_of(self, index: int) -> Prompt:
        """Of choice number `index`, over all prompts."""
        return self.prompts[index // self.num_choices]

    def prompt_field(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, object]:
        """The prompt's log-probabilities, if they were asked for."""
        if self.num_prompt_logprobs is None:
            return {}
        entries = prompt_entries(self.names, logprobs, self.num_prompt_logprobs)
        return {"prompt_logprobs": entries}


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
    token_ids: Sequence[int] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()


class WireFormat(Protocol):
    """One route's bytes. Stateful over one stream. `usage`: of the choice so far, in a frame with
    continuous usage."""

    def opening(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        """Sent before the first text of a choice, which is that of `delta`."""
        ...

    def text(self, index: int, text: str) -> bytes:
        """A chunk of a plain frame."""
        ...

    def detailed(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        """Chunks of a frame that is not plain; may be empty."""
        ...

    def finish(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        """The end of a choice; `delta` has its finish reason."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The last chunk before the end of the stream, with no choices."""
        ...

    def end(self) -> bytes:
        """The end of a stream in which nothing failed."""
        ...

    def error(self, error: BaseException) -> bytes:
        """The end of a stream that broke."""
        ...

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""
        ...


class DataStream:
    """How streams of the chat and the completions route end."""

    def end(self) -> bytes:
        return DONE

    def error(self, error: BaseException) -> bytes:
        return b"data: %b\n\n" % error_answer(error).body


class ChunkWriter:
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
        *,
        logprobs: bytes = b"null",
        finish: bytes = b"null",
        in_choice: dict[str, object] | None = None,
        on_top: dict[str, object] | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """`payload`: the choice's text or delta. `in_choice`, `on_top`: more fields."""
        end = self._end
        if usage is not None:
            end = b'}],"usage":%b}\n\n' % orjson.dumps(usage_object(usage))
        if on_top:
            # Before the closing brace of the whole object and the blank line.
            end = end[:-3] + b"," + orjson.dumps(on_top)[1:-1] + b"}\n\n"
        more = b"," + orjson.dumps(in_choice)[1:-1] if in_choice else b""
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b%b' % (
            self._start, index, payload, logprobs, finish, more, end,
        )  # fmt: skip

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._start, orjson.dumps(usage_object(usage)))


def end_fields(delta: GenerationDelta | Choice) -> dict[str, object]:
    """What a choice has at its end beside the finish reason."""
    return {"stop_reason": delta.stop_reason, **own_fields(delta.timing)}


def own_fields(timing: RequestTiming | None) -> dict[str, object]:
    """What a choice has beyond the OpenAI API; nothing unless the client asked for it."""
    return {} if timing is None else {"baton": {"timing": timing}}


def finish_name(reason: FinishReason | None) -> str:
    """Raises InternalError for reasons that the dispatcher reports as errors instead."""
    name = None if reason is None else _FINISH.get(reason)
    if name is None:
        ended = "nothing" if reason is None else reason.value
        raise InternalError(f"the generation ended as {ended} without saying why")
    return name


def usage_object(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def answer_body(
    frame: Frame,
    object_name: str,
    choices: list[dict[str, object]],
    usage: Usage,
    on_top: dict[str, object],
) -> bytes:
    return orjson.dumps(
        {
            "id": frame.response_id,
            "object": object_name,
            "created": frame.created_s,
            "model": frame.model,
            "choices": choices,
            "usage": usage_object(usage),
            **on_top,
        }
    )
