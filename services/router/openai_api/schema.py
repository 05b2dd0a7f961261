"""What a request body may hold: the definitions that parse it and that the API's document shows.

Unknown fields are ignored, since clients send many that change nothing here. Fields that would
change the result and are not implemented are refused by name. Types are strict: a number sent as
a string is an error. Ranges are checked where the values are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from baton.core.errors import InvalidRequest
from services.router.edge.preprocess import MAX_MESSAGES, describe

MAX_CHOICES_PER_PROMPT = 128
MAX_TOOLS = 128

_NOTHING: tuple[object, ...] = (None, [], {}, "")
_NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
    # Field -> values under which it changes nothing.
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "suffix": (None, ""),
    "audio": _NOTHING,
    "modalities": (None, [], ["text"]),
    "web_search_options": (None,),
    "prompt_embeds": _NOTHING,
    "use_beam_search": (None, False),
    "chat_template": (None,),
    "documents": _NOTHING,
    "structural_tag": _NOTHING,
}

STOP_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]
}
_IDS = {"type": "array", "items": {"type": "integer"}}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _IDS,
        {"type": "array", "items": _IDS},
    ]
}
CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}
SCHEMA_OR_TEXT = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    ]
}


class Body(BaseModel):
    """Of every JSON body. A null is the same as leaving the field out."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """A usage in every chunk; takes include_usage."""


class JsonSchemaFormat(Body):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """One of them says what the output must look like."""

    json_: Annotated[Any, Field(alias="json"), WithJsonSchema(SCHEMA_OR_TEXT)] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class OwnOptions(Body):
    """What a request can ask of this platform beyond the OpenAI API."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    timing: bool | None = None
    """Each choice says at its end where its time went."""


class SharedFields(Body):
    """Fields that mean the same in every API here, many of them vLLM's. None means: not given."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Annotated[Any, WithJsonSchema(STOP_SCHEMA)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: int | None = None


class GenerationBody(SharedFields):
    """The fields that both OpenAI routes share."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] | None = None
    max_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Any, WithJsonSchema(SCHEMA_OR_TEXT)] = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    baton: OwnOptions | None = None


class FunctionCallBody(Body):
    name: str
    arguments: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
    ] = None


class ToolCallBody(Body):
    """A call that an assistant made earlier in the conversation."""

    id: str | None = None
    type: str | None = None
    function: FunctionCallBody


class ChatMessageBody(Body):
    role: str
    content: Annotated[Any, WithJsonSchema(CONTENT_SCHEMA)] = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    function_call: Any = None


class FunctionBody(Body):
    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:/-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody


class TemplateOptions(Body):
    """How a conversation becomes a prompt."""

    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatBody(GenerationBody, TemplateOptions):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessageBody], Field(max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)] = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(TemplateOptions):
    """POST /tokenize: of a text or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessageBody], Field(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[Any, WithJsonSchema(_IDS)] = None


class TextPart(Body):
    """One element of a message's content list."""

    type: Literal["text"]
    text: str


B = TypeVar("B", bound=Body)


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
            raise InvalidRequest(f"{name} is not supported; leave it out", param=name)
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
