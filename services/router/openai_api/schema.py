"""What a request body may hold.

Unknown fields are ignored, since clients send many that change nothing here. Fields that would
change the result and are not implemented are refused by name. Types are strict: a number sent as
a string is an error. Ranges are checked where the values are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.core.errors import InvalidRequest
from services.router.edge.preprocess import MAX_MESSAGES, describe, shorten

MAX_CHOICES_PER_PROMPT = 8

_NOTHING: tuple[object, ...] = (None, [], {}, "")
_NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
    # Field -> values under which it changes nothing.
    "tools": _NOTHING,
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "audio": _NOTHING,
    "modalities": (None, [], ["text"]),
    "web_search_options": (None,),
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "prompt_logprobs": (None,),
    "prompt_embeds": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "bad_words": _NOTHING,
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "chat_template": (None,),
    "chat_template_kwargs": _NOTHING,
    "documents": _NOTHING,
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "return_token_ids": (None, False),
}
_RESPONSE_FORMATS = ("text", "json_object", "json_schema")


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class StreamOptions(_Body):
    include_usage: bool | None = None


class ResponseFormat(_Body):
    type: str


class OwnOptions(_Body):
    """What a request can ask of this platform beyond the OpenAI API."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    timing: bool | None = None
    """Each choice says at its end where its time went."""


class GenerationBody(_Body):
    """The fields both routes share. None means: not given."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    priority: int | None = None
    baton: OwnOptions | None = None


class ChatMessageBody(_Body):
    role: str
    content: Any = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessageBody], Field(max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Any = None
    logprobs: int | None = None


class TextPart(_Body):
    """One element of a message's content list."""

    type: Literal["text"]
    text: str


B = TypeVar("B", bound=_Body)


def parse_body(data: bytes, cls: type[B]) -> B:
    """Raises InvalidRequest saying what is wrong with the JSON or which field is."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {describe(content)}")
    for name in _NOT_SUPPORTED.keys() & content.keys():
        if content[name] not in _NOT_SUPPORTED[name]:
            raise InvalidRequest(f"{name} is not supported yet; leave it out", param=name)
    return validate(content, cls)


def validate(content: object, cls: type[B], where: str = "") -> B:
    """`content` as an instance of `cls`. Raises InvalidRequest naming the first wrong field."""
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(filter(None, (where, *map(str, first["loc"]))))
        if first["type"] == "missing":
            raise InvalidRequest(f"{param} is required", param=param) from None
        problem = first["msg"].replace("Input should be", "must be", 1)
        raise InvalidRequest(
            f"{param}: {problem[0].lower()}{problem[1:]}, got {describe(first['input'])}",
            param=param,
        ) from None


def check_response_format(response_format: ResponseFormat | None) -> None:
    """Raises InvalidRequest for everything but plain text."""
    if response_format is None or response_format.type == "text":
        return
    if response_format.type not in _RESPONSE_FORMATS:
        raise InvalidRequest(
            f"response_format.type must be one of {', '.join(_RESPONSE_FORMATS)}, "
            f"got {shorten(response_format.type)}",
            param="response_format",
        )
    raise InvalidRequest(
        f"response_format {response_format.type} is not supported yet; use text",
        param="response_format",
    )
