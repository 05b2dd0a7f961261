"""Messages made of content blocks as messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping

from baton.core.errors import InvalidRequest
from services.router.edge.preprocess import describe
from services.router.openai_api.as_chat import (
    call_entry,
    chat_body,
    part_text,
    string_field,
    text_of,
)
from services.router.openai_api.messages.message_schema import (
    CountTokensBody,
    MessageBody,
    MessagesBody,
    MessageToolChoice,
)
from services.router.openai_api.schema import ChatBody

Message = dict[str, object]

NAMES = {
    # Chat field -> the client's.
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "function.parameters": "input_schema",
    "user": "metadata.user_id",
}
_TEXT = {"text": "text"}
_THOUGHTS = ("thinking", "redacted_thinking")


def as_chat(body: CountTokensBody) -> ChatBody:
    """Raises InvalidRequest; see NAMES."""
    messages: list[Message] = []
    if body.system is not None:
        messages.append({"role": "system", "content": text_of(body.system, "system", _TEXT)})
    for index, message in enumerate(body.messages):
        _add(messages, message, f"messages.{index}")
    continues = _continues(messages[-1])
    choice = body.tool_choice
    return chat_body(
        body,
        messages,
        tools=[_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools or ()]
        or None,
        tool_choice=None if choice is None else _tool_choice(choice),
        parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
        # An answer begun by the client goes on.
        continue_final_message=True if continues else None,
        **(_output_fields(body) if isinstance(body, MessagesBody) else {}),
    )


def _output_fields(body: MessagesBody) -> dict[str, object]:
    for name, value in (("mcp_servers", body.mcp_servers), ("container", body.container)):
        if value:
            raise InvalidRequest(f"{name} is not supported; leave it out", param=name)
    if body.stop is not None and body.stop_sequences is not None:
        raise InvalidRequest(
            "stop and stop_sequences both say where the output ends; send stop_sequences alone",
            param="stop_sequences",
        )
    fields: dict[str, object] = {"max_completion_tokens": body.max_tokens}
    if body.stop_sequences is not None:
        fields["stop"] = body.stop_sequences
    if body.metadata is not None:
        fields["user"] = body.metadata.user_id
    wanted = body.output_format
    if body.output_config is not None and body.output_config.format is not None:
        wanted = body.output_config.format
    if wanted is not None:
        schema = {"name": "output", "schema": wanted.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _continues(last: Message) -> bool:
    return last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last


def _add(messages: list[Message], message: MessageBody, where: str) -> None:
    where = f"{where}.content"
    content = message.content
    if isinstance(content, str):
        messages.append({"role": message.role, "content": content})
        return
    if not isinstance(content, list):
        raise InvalidRequest(
            f"{where} must be a string or a list of content blocks, got {describe(content)}",
            param=where,
        )
    texts: list[str] = []
    calls: list[Message] = []
    for index, block in enumerate(content):
        at = f"{where}.{index}"
        match (message.role, block.get("type") if isinstance(block, dict) else None):
            case ("assistant", "tool_use"):
                calls.append(_call(block, at))
            case ("user", "tool_result"):
                messages.append(_result(block, at))
            case ("assistant", kind) if kind in _THOUGHTS:
                # What a model thought is not in the prompt of its next turn.
                continue
            case _:
                texts.append(part_text(block, at, _TEXT))
    if not texts and not calls and content and message.role == "user":
        # Results alone; they are messages already.
        return
    plain: Message = {"role": message.role, "content": "".join(texts)}
    if calls:
        plain["tool_calls"] = calls
    messages.append(plain)


def _call(block: Mapping[str, object], where: str) -> Message:
    return call_entry(
        string_field(block, "id", where),
        string_field(block, "name", where),
        block.get("input"),
        f"{where}.input",
    )


def _result(block: Mapping[str, object], where: str) -> Message:
    content = block.get("content")
    return {
        "role": "tool",
        "tool_call_id": string_field(block, "tool_use_id", where),
        "content": "" if content is None else text_of(content, f"{where}.content", _TEXT),
    }


def _tool(name: str, description: str | None, parameters: object) -> Message:
    function = {"name": name, "description": description, "parameters": parameters}
    given = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _tool_choice(choice: MessageToolChoice) -> object:
    match choice.type:
        case "any":
            return "required"
        case "tool":
            if choice.name is None:
                raise InvalidRequest(
                    "tool_choice.name is required for type tool", param="tool_choice.name"
                )
            return {"type": "function", "function": {"name": choice.name}}
    return choice.type
