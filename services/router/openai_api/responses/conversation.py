"""Input items as chat messages, and the messages that follow from an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from baton.core.errors import InvalidRequest
from services.router.edge.preprocess import check_num_messages, describe
from services.router.openai_api.as_chat import call_entry, chat_body, string_field, text_of
from services.router.openai_api.blocks import Block, CallBlock, TextBlock
from services.router.openai_api.responses.response_schema import ResponsesBody
from services.router.openai_api.schema import ChatBody

Message = dict[str, object]

NAMES = {
    # Chat field -> the client's.
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_OUTPUTS = {"input_text": "text", "output_text": "text", "text": "text"}


def as_chat(body: ResponsesBody, messages: Sequence[Mapping[str, object]]) -> ChatBody:
    """`messages`: of the conversation, without instructions. Raises InvalidRequest; see NAMES."""
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    return chat_body(
        body,
        messages,
        max_completion_tokens=body.max_output_tokens,
        logprobs=True if body.wants_logprobs else None,
        top_logprobs=body.top_logprobs if body.wants_logprobs else None,
        tools=[_tool(tool.name, tool.description, tool.parameters) for tool in body.tools or ()]
        or None,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        # Requests that share a cached prefix are best where that is.
        user=body.user or body.prompt_cache_key,
    )


def input_messages(given: object) -> list[Message]:
    """Raises InvalidRequest."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest(
            f"input must be a string or a list of items, not empty, got {describe(given)}",
            param="input",
        )
    check_num_messages(len(given))
    messages: list[Message] = []
    for index, item in enumerate(given):
        _add_item(messages, item, f"input.{index}")
    if not messages:
        raise InvalidRequest("input has no message; send at least one", param="input")
    return messages


def output_messages(blocks: Iterable[Block]) -> list[Message]:
    """What an answer adds to its conversation."""
    blocks = list(blocks)
    text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
    message: Message = {"role": "assistant", "content": text}
    calls = [
        {
            "id": block.call_id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.arguments_object()},
        }
        for block in blocks
        if isinstance(block, CallBlock)
    ]
    if calls:
        message["tool_calls"] = calls
    return [message]


def _add_item(messages: list[Message], item: object, where: str) -> None:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{where} must be an object, got {describe(item)}", param=where)
    match item.get("type"):
        case None | "message":
            messages.append(_message(item, where))
        case "function_call":
            call = call_entry(
                string_field(item, "call_id", where),
                string_field(item, "name", where),
                item.get("arguments"),
                f"{where}.arguments",
            )
            _add_call(messages, call)
        case "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": string_field(item, "call_id", where),
                    "content": text_of(item.get("output"), f"{where}.output", _OUTPUTS),
                }
            )
        case "reasoning":
            pass
        case kind:
            raise InvalidRequest(
                f"{where}.type must be message, function_call, function_call_output or reasoning, "
                f"got {describe(kind)}",
                param=f"{where}.type",
            )


def _message(item: Mapping[str, object], where: str) -> Message:
    role = item.get("role")
    if role not in ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)}, got {describe(role)}",
            param=f"{where}.role",
        )
    return {"role": role, "content": text_of(item.get("content"), f"{where}.content", _TEXTS)}


def _add_call(messages: list[Message], call: dict[str, object]) -> None:
    """Calls of one turn are one message, with the text before them."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    calls = messages[-1].setdefault("tool_calls", [])
    assert isinstance(calls, list)
    calls.append(call)


def _tool(name: str, description: str | None, parameters: object) -> Message:
    function = {"name": name, "description": description, "parameters": parameters}
    given = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _tool_choice(choice: object) -> object:
    match choice:
        case None | "none" | "auto" | "required":
            return choice
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    raise InvalidRequest(
        'tool_choice must be "none", "auto", "required" or {"type": "function", "name": ...}, got '
        f"{describe(choice)}",
        param="tool_choice",
    )


def _response_format(body: ResponsesBody) -> Message | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    if wanted.json_schema is None:
        raise InvalidRequest(
            "text.format.schema is required for type json_schema", param="text.format.schema"
        )
    return {
        "type": "json_schema",
        "json_schema": {"name": wanted.name, "schema": wanted.json_schema},
    }
