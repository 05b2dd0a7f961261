"""What the body of POST /v1/responses may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from baton.core.errors import InvalidRequest
from services.router.openai_api.as_chat import SharedOptions
from services.router.openai_api.schema import MAX_TOOLS, Body

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_ID_CHARS = 128

LOGPROBS = "message.output_text.logprobs"
_INPUT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]
}
_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
            "required": ["type", "name"],
        },
    ]
}


class FunctionTool(Body):
    """Unlike in the chat route, with nothing around the definition."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Body):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Body):
    effort: str | None = None
    summary: str | None = None


class ResponsesBody(SharedOptions):
    """POST /v1/responses."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Any, WithJsonSchema(_TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    previous_response_id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None
    store: bool | None = None
    """Absent: yes."""
    background: bool | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=MAX_METADATA_KEY_CHARS)],
                Annotated[str, Field(max_length=MAX_METADATA_VALUE_CHARS)],
            ],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def check_response(body: ResponsesBody) -> None:
    """What does not go together, and what is not done. Raises InvalidRequest."""
    for name, value in (("conversation", body.conversation), ("prompt", body.prompt)):
        if value is not None:
            raise InvalidRequest(
                f"{name} is not supported; send input, with previous_response_id to go on",
                param=name,
            )
    if not body.background:
        return
    if body.stream:
        raise InvalidRequest(
            "background does not go with stream; leave one of them out, and fetch the response "
            "until it is completed",
            param="background",
        )
    if not body.is_stored:
        raise InvalidRequest(
            "background needs store: true, or its answer could not be fetched", param="background"
        )
