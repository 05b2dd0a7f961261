"""What the bodies of POST /v1/messages and /v1/messages/count_tokens may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from services.router.edge.preprocess import MAX_MESSAGES
from services.router.openai_api.as_chat import SharedOptions
from services.router.openai_api.schema import MAX_TOOLS, Body

_BLOCKS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"type": "string"}},
        "required": ["type"],
    },
}
_CONTENT = {"anyOf": [{"type": "string"}, _BLOCKS]}
_SYSTEM = {"anyOf": [{"type": "string"}, _BLOCKS, {"type": "null"}]}


class MessageBody(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Any, WithJsonSchema(_CONTENT)]


class MessageTool(Body):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class MessageToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    format: OutputFormat | None = None
    effort: str | None = None


class MessageMetadata(Body):
    user_id: str | None = None


class CountTokensBody(SharedOptions):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Annotated[Any, WithJsonSchema(_SYSTEM)] = None
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessageToolChoice | None = None


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    metadata: MessageMetadata | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None
