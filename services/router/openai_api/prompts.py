"""The prompt part of a body as plain values: messages, texts or lists of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from baton.core.errors import InvalidRequest
from services.router.edge.conversation import PLAIN_CHAT, ChatOptions
from services.router.edge.preprocess import check_depth, describe
from services.router.openai_api.schema import (
    ChatMessageBody,
    TemplateOptions,
    TextPart,
    ToolCallBody,
    validate,
)

MAX_PROMPTS = 256


def plain_messages(messages: Sequence[ChatMessageBody]) -> list[Mapping[str, object]]:
    """Messages as chat templates take them: content is a string, arguments of calls are objects.
    Raises InvalidRequest."""
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def num_chars(messages: Sequence[Mapping[str, object]]) -> int:
    return sum(len(str(message["content"])) for message in messages)


def chat_options(
    body: TemplateOptions,
    tools: Sequence[Mapping[str, object]],
    reasoning_effort: str | None = None,
) -> ChatOptions:
    """`tools`: those for the prompt."""
    variables = dict(body.chat_template_kwargs or {})
    check_depth(variables, "chat_template_kwargs")
    if reasoning_effort is not None:
        variables.setdefault("reasoning_effort", reasoning_effort)
    continues = bool(body.continue_final_message)
    begins = body.add_generation_prompt
    if not (tools or variables or continues or begins is False):
        return PLAIN_CHAT
    begins_answer = not continues if begins is None else begins
    return ChatOptions(tuple(tools), begins_answer, continues, variables)


def _message(message: ChatMessageBody, where: str) -> Mapping[str, object]:
    if message.function_call:
        raise InvalidRequest(
            "function_call is what tool_calls were before; send tool_calls",
            param=f"{where}.function_call",
        )
    plain: dict[str, object] = {"role": message.role, "content": _content(message, where)}
    if message.tool_calls:
        plain["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _tool_call(call: ToolCallBody, where: str) -> Mapping[str, object]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(
                f"{where}.function.arguments is not valid JSON: {error}",
                param=f"{where}.function.arguments",
            ) from None
    check_depth(arguments, f"{where}.function.arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise InvalidRequest(
            f"{where}.function.arguments must be a JSON object, got {describe(arguments)}",
            param=f"{where}.function.arguments",
        )
    return {
        "id": call.id or "",
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments or {}},
    }


def _content(message: ChatMessageBody, where: str) -> str:
    content = message.content
    where = f"{where}.content"
    if isinstance(content, str):
        return content
    if content is None and message.role == "assistant":
        return ""
    if not isinstance(content, list):
        raise InvalidRequest(
            f"{where} must be a string or a list of text parts, got {describe(content)}",
            param=where,
        )
    return "".join(_part_text(part, f"{where}.{i}") for i, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    match part:
        case {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise InvalidRequest(
                f"{where} is a part of type {describe(kind)}; this model takes text parts only",
                param=where,
            )
    return validate(part, TextPart, where).text


def plain_prompts(prompt: object) -> list[str | list[object]]:
    """The prompts of a completions body: a text, token ids, or a list of either.

    Whether a list really holds token ids is left to the check against the vocabulary. Raises
    InvalidRequest.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise InvalidRequest(
            "prompt must be a string, a list of strings, a list of token ids or a list of such "
            f"lists, got {describe(prompt)}",
            param="prompt",
        )
    if not prompt:
        raise InvalidRequest("prompt is empty; send at least one token", param="prompt")
    if not isinstance(prompt[0], str | list):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt takes at most {MAX_PROMPTS} prompts, got {len(prompt)}", param="prompt"
        )
    return [_one_prompt(entry, f"prompt.{index}") for index, entry in enumerate(prompt)]


def plain_stop(stop: object) -> list[str]:
    """Stop strings of a body: absent, one, or a list. Raises InvalidRequest."""
    entries = stop if isinstance(stop, list) else [] if stop is None else [stop]
    strings = [entry for entry in entries if isinstance(entry, str)]
    if len(strings) != len(entries):
        wrong = next(entry for entry in entries if not isinstance(entry, str))
        raise InvalidRequest(
            f"stop must be a string or a list of strings, got {describe(wrong)}", param="stop"
        )
    return strings


def _one_prompt(entry: object, where: str) -> str | list[object]:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, list):
        raise InvalidRequest(
            f"{where} must be a string or a list of token ids, got {describe(entry)}", param=where
        )
    return entry
