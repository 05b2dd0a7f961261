"""The prompt part of a body as plain values: messages, texts or lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.errors import InvalidRequest
from services.router.edge.preprocess import describe
from services.router.openai_api.schema import ChatMessageBody, TextPart, validate

MAX_PROMPTS = 256


def plain_messages(messages: Sequence[ChatMessageBody]) -> list[dict[str, str]]:
    """`{"role", "content"}` of each message. Raises InvalidRequest."""
    plain = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if message.tool_calls or message.function_call:
            raise InvalidRequest(
                "tool calls in messages are not supported yet; leave them out",
                param=f"{where}.tool_calls",
            )
        plain.append({"role": message.role, "content": _content(message, where)})
    return plain


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
