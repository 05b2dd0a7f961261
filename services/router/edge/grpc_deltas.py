"""Deltas of one request as the messages that gRPC clients get."""

from __future__ import annotations

from collections.abc import Iterable

from baton.core.errors import InternalError
from baton.core.request import FinishReason
from baton.rpc.convert import finish_to_wire, logprobs_to_wire
from baton.rpc.v1 import inference_pb2 as pb
from services.router.edge.wire_timing import timing_to_wire
from services.router.openai_api.tool_plan import ToolPlan
from services.router.openai_api.tools.tool_events import (
    Arguments,
    CallBegun,
    Event,
    Text,
    ToolParser,
    joined,
)
from services.router.openai_api.wire_format import Frame
from services.router.requests.generation import GenerationDelta


class DeltaWriter:
    """Of one request; stateful where tool calls are looked for."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._parsers: dict[int, ToolParser] = {}
        """By answer."""
        self._begun: set[int] = set()
        self._is_plain = not (frame.tools.is_on or frame.echo or frame.returns_token_ids)

    def message(self, index: int, delta: GenerationDelta) -> pb.InferenceDelta:
        """Raises InternalError for ends that the dispatcher reports as errors instead."""
        if delta.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
            raise InternalError(f"the generation ended as {delta.finish_reason.value}")
        message = pb.InferenceDelta(
            request_id=self._frame.response_id,
            model=self._frame.model,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=[logprobs_to_wire(entry) for entry in delta.logprobs],
            finish_reason=finish_to_wire(delta.finish_reason),
        )
        if index:
            message.index = index
        if delta.prompt_logprobs:
            message.prompt_logprobs.extend(map(logprobs_to_wire, delta.prompt_logprobs))
        if not self._is_plain:
            self._add(message, index, delta)
        if delta.finish_reason is not None:
            _add_end(message, delta)
        return message

    def _add(self, message: pb.InferenceDelta, index: int, delta: GenerationDelta) -> None:
        frame = self._frame
        if frame.tools.is_on:
            events = self._events(index, delta)
            message.text = "".join(e.text for e in events if isinstance(e, Text))
            message.tool_calls.extend(call_deltas(frame.tools, events))
        if index not in self._begun:
            self._begun.add(index)
            prompt = frame.prompt_of(index)
            if frame.echo:
                text = prompt.text
                if text is None:
                    text = frame.tokenizer.decode(
                        prompt.token_ids, skip_special_tokens=frame.skip_special_tokens
                    )
                message.text = text + message.text
            if frame.returns_token_ids:
                message.prompt_token_ids.extend(prompt.token_ids)

    def _events(self, index: int, delta: GenerationDelta) -> list[Event]:
        parser = self._parsers.get(index)
        if parser is None:
            parser = self._parsers[index] = self._frame.tools.parser()
        events = list(parser.push(delta.text))
        if delta.finish_reason is not None:
            events += parser.finish()
        return joined(events)


def call_deltas(plan: ToolPlan, events: Iterable[Event]) -> list[pb.ToolCallDelta]:
    deltas = []
    for event in events:
        if isinstance(event, Text) or (event.call and not plan.is_parallel):
            continue
        match event:
            case CallBegun(call, name):
                deltas.append(pb.ToolCallDelta(call=call, id=plan.new_call_id(), name=name))
            case Arguments(call, text):
                deltas.append(pb.ToolCallDelta(call=call, arguments=text))
    return deltas


def _add_end(message: pb.InferenceDelta, delta: GenerationDelta) -> None:
    if isinstance(delta.stop_reason, str):
        message.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        message.stop_token_id = delta.stop_reason
    if delta.usage is not None:
        message.usage.CopyFrom(
            pb.Usage(
                prompt_tokens=delta.usage.prompt_tokens,
                completion_tokens=delta.usage.completion_tokens,
                cached_tokens=delta.usage.cached_tokens,
            )
        )
    if delta.timing is not None:
        message.timing.CopyFrom(timing_to_wire(delta.timing))
