"""What POST /v1/completions writes."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.router.openai_api.logprobs import CompletionArrays, CompletionLogprobs
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


class CompletionFormat(DataStream):
    """A `WireFormat`."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._chunk = ChunkWriter(frame, "text_completion", (b'"text":', b""))
        self._arrays: dict[int, CompletionArrays] = {}
        """By choice."""

    def opening(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        frame = self._frame
        if not frame.echo and not frame.returns_token_ids:
            return b""
        text, logprobs = "", b"null"
        if frame.echo:
            text = self._prompt_text(index)
            if frame.num_top_logprobs is not None:
                token_ids = frame.prompt_of(index).token_ids
                arrays = self._arrays_of(index).of_prompt(token_ids, delta.prompt_logprobs)
                logprobs = orjson.dumps(arrays)
        return self._chunk.write(
            index,
            b'"text":' + orjson.dumps(text),
            logprobs=logprobs,
            in_choice=self._prompt_ids(index),
            usage=usage,
        )

    def text(self, index: int, text: str) -> bytes:
        return self._chunk.text(index, text)

    def detailed(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        frame = self._frame
        has_more = bool(delta.logprobs) or frame.returns_token_ids
        if frame.drops_output or not (delta.text or has_more):
            return b""
        logprobs = b"null"
        if frame.num_top_logprobs is not None and delta.logprobs:
            logprobs = orjson.dumps(self._arrays_of(index).of_output(delta.logprobs))
        return self._chunk.write(
            index,
            b'"text":' + orjson.dumps(delta.text),
            logprobs=logprobs,
            in_choice={"token_ids": delta.token_ids} if frame.returns_token_ids else None,
            usage=usage,
        )

    def finish(self, index: int, delta: GenerationDelta, usage: Usage | None = None) -> bytes:
        return self._chunk.write(
            index,
            b'"text":""',
            finish=orjson.dumps(self._finish_name(delta)),
            in_choice=end_fields(delta),
            usage=usage,
        )

    def usage(self, usage: Usage) -> bytes:
        return self._chunk.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        entries = [self._choice(choice) for choice in choices]
        return answer_body(self._frame, "text_completion", entries, usage, {})

    def _choice(self, choice: Choice) -> dict[str, object]:
        frame = self._frame
        text = "" if frame.drops_output else choice.text
        if frame.echo:
            text = self._prompt_text(choice.index) + text
        entry: dict[str, object] = {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice),
            "finish_reason": self._finish_name(choice),
            **end_fields(choice),
            **frame.prompt_field(choice.prompt_logprobs),
        }
        if frame.returns_token_ids:
            entry["token_ids"] = () if frame.drops_output else choice.token_ids
            entry |= self._prompt_ids(choice.index) or {}
        return entry

    def _logprobs(self, choice: Choice) -> CompletionLogprobs | None:
        frame = self._frame
        if frame.num_top_logprobs is None:
            return None
        arrays, own = self._arrays_of(choice.index), CompletionLogprobs()
        if frame.echo:
            own = arrays.of_prompt(frame.prompt_of(choice.index).token_ids, choice.prompt_logprobs)
        if not frame.drops_output:
            own.extend(arrays.of_output(choice.logprobs))
        return own

    def _arrays_of(self, index: int) -> CompletionArrays:
        arrays = self._arrays.get(index)
        if arrays is None:
            frame = self._frame
            before = () if frame.echo or not frame.prompts else frame.prompt_of(index).token_ids
            detokenizer = frame.tokenizer.detokenizer(
                before, skip_special_tokens=frame.skip_special_tokens
            )
            arrays = CompletionArrays(frame.names, frame.num_top_logprobs or 0, detokenizer)
            self._arrays[index] = arrays
        return arrays

    def _prompt_text(self, index: int) -> str:
        prompt = self._frame.prompt_of(index)
        if prompt.text is not None:
            return prompt.text
        skip = self._frame.skip_special_tokens
        return self._frame.tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)

    def _prompt_ids(self, index: int) -> dict[str, object] | None:
        if not self._frame.returns_token_ids:
            return None
        return {"prompt_token_ids": self._frame.prompt_of(index).token_ids}

    def _finish_name(self, end: GenerationDelta | Choice) -> str:
        # A token that nobody asked for may have been the model's last.
        return "length" if self._frame.drops_output else finish_name(end.finish_reason)
