"""Requests of the gRPC API as the bodies that the HTTP routes parse, so that both mean the same.

Sampling has a message of its own, shared with the workers, and becomes a `SamplingPlan` directly.
"""

from __future__ import annotations

import dataclasses

import orjson

from baton.core.errors import InvalidRequest
from baton.rpc.convert import sampling_from_wire
from baton.rpc.v1 import inference_pb2 as pb
from services.router.edge.preprocess import check_sampling
from services.router.openai_api.sampling import SamplingPlan, bad_word_ids
from services.router.openai_api.schema import ChatBody, CompletionBody, validate
from services.router.requests.generation import ModelCard

GENERATE_MAX_TOKENS = 16
"""What Generate produces when max_tokens is absent, as on the completions route."""

_CHOICES = {
    pb.TOOL_CHOICE_MODE_AUTO: "auto",
    pb.TOOL_CHOICE_MODE_NONE: "none",
    pb.TOOL_CHOICE_MODE_REQUIRED: "required",
}

Request = pb.ChatRequest | pb.CompletionRequest
Fields = dict[str, object]


def chat_body(request: pb.ChatRequest) -> ChatBody:
    """Raises InvalidRequest."""
    fields = _shared(request)
    fields["messages"] = [_message(message) for message in request.messages]
    if request.tools:
        fields["tools"] = [_tool(tool, f"tools.{i}") for i, tool in enumerate(request.tools)]
    if request.tool_choice.mode:
        fields["tool_choice"] = _CHOICES.get(
            request.tool_choice.mode,
            {"type": "function", "function": {"name": request.tool_choice.name}},
        )
    if request.HasField("parallel_tool_calls"):
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    if request.chat_template_kwargs:
        fields["chat_template_kwargs"] = _json(request.chat_template_kwargs, "chat_template_kwargs")
    if request.HasField("add_generation_prompt"):
        fields["add_generation_prompt"] = request.add_generation_prompt
    fields["continue_final_message"] = request.continue_final_message
    return validate(fields, ChatBody)


def completion_body(request: pb.CompletionRequest) -> CompletionBody:
    """Raises InvalidRequest."""
    fields = _shared(request)
    match request.WhichOneof("prompt"):
        case "text":
            fields["prompt"] = request.text
        case "token_ids":
            fields["prompt"] = list(request.token_ids.ids)
        case None:
            raise InvalidRequest("prompt is required; set text or token_ids", param="prompt")
    fields["echo"] = request.echo
    if request.HasField("add_special_tokens"):
        fields["add_special_tokens"] = request.add_special_tokens
    return validate(fields, CompletionBody)


def sampling_plan(card: ModelCard, request: Request) -> SamplingPlan:
    """Raises InvalidRequest."""
    wire = request.sampling
    is_chat = isinstance(request, pb.ChatRequest)
    default = None if is_chat else GENERATE_MAX_TOKENS
    sampling = sampling_from_wire(wire, max_tokens=default or card.max_model_len)
    options = request.options
    if options.bad_words:
        ids = (*sampling.bad_words_ids, *bad_word_ids(card.tokenizer, options.bad_words))
        sampling = dataclasses.replace(sampling, bad_words_ids=ids)
    if options.include_stop_str_in_output:
        sampling = dataclasses.replace(sampling, include_stop_token=True)
    if isinstance(request, pb.CompletionRequest) and request.echo and sampling.logprobs is not None:
        sampling = dataclasses.replace(sampling, prompt_logprobs=sampling.logprobs)
    asked = wire.max_tokens if wire.HasField("max_tokens") else None
    return SamplingPlan(card, check_sampling(card, sampling), asked, default)


def _shared(request: Request) -> Fields:
    """The fields of `GenerationBody`. What is not set is left out: most requests have little."""
    options = request.options
    fields: Fields = {
        "model": request.model,
        "stream": True,
        "stop": list(request.stop) or None,
        "baton": {"timing": request.with_timing} if request.with_timing else None,
        "cache_salt": options.cache_salt or None,
        "user": options.user or None,
        "include_stop_str_in_output": options.include_stop_str_in_output,
        "return_token_ids": options.return_prompt_token_ids,
    }
    for name in ("n", "skip_special_tokens", "truncate_prompt_tokens", "priority"):
        if options.HasField(name):
            fields[name] = getattr(options, name)
    return fields


def _message(message: pb.ChatMessage) -> Fields:
    fields: Fields = {"role": message.role, "content": message.content}
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return fields


def _tool(tool: pb.Tool, where: str) -> Fields:
    function: Fields = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = _json(tool.parameters, f"{where}.parameters")
    return {"type": "function", "function": function}


def _json(text: str, where: str) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{where} is not valid JSON: {error}", param=where) from None
