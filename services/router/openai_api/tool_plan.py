"""What a chat request says of tools: which are in the prompt, and how calls are found or forced."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from baton.core.errors import InvalidRequest
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.tokenizer import Tokenizer
from services.router.edge.edge_config import ToolParserChoice
from services.router.edge.preprocess import check_depth, describe, shorten
from services.router.openai_api.schema import ChatBody, ToolBody
from services.router.openai_api.structured import Wanted, named
from services.router.openai_api.tools.families import ToolFamily, family_of, new_parser
from services.router.openai_api.tools.forced import (
    ListParser,
    NamedParser,
    list_schema,
    named_schema,
)
from services.router.openai_api.tools.tool_events import ToolParser

_ID_LETTERS = string.ascii_letters + string.digits
_ID_CHARS = 24


class Choice(Enum):
    """tool_choice, as far as it is a word."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """Of one request."""

    tools: tuple[Mapping[str, object], ...] = ()
    """Definitions for the prompt."""
    choice: Choice = Choice.NONE
    name: str = ""
    """Of the tool that must be called, with Choice.NAMED."""
    family: ToolFamily = ToolFamily.HERMES
    is_parallel: bool = True
    """An answer may have more than one call."""
    parameters: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Each tool's properties, by name."""
    forced: Wanted | None = None
    """What the output must look like for the call that is asked for."""

    @property
    def is_on(self) -> bool:
        """Calls are looked for in the output."""
        return self.choice is not Choice.NONE

    @property
    def needs_special_tokens(self) -> bool:
        return self.choice is Choice.AUTO and self.family.needs_special_tokens

    @property
    def names_finish(self) -> bool:
        """An answer with calls ends for the reason tool_calls; where the client has said which one
        it wants, it ends for the reason stop."""
        return self.choice is not Choice.NAMED

    def parser(self) -> ToolParser:
        """For one answer."""
        match self.choice:
            case Choice.NAMED:
                return NamedParser(self.name)
            case Choice.REQUIRED:
                return ListParser()
        return new_parser(self.family, self.parameters)

    def new_call_id(self) -> str:
        num_chars = self.family.id_chars
        letters = "".join(random.choices(_ID_LETTERS, k=num_chars or _ID_CHARS))
        return letters if num_chars else f"call_{letters}"


NO_TOOLS = ToolPlan()


def tool_plan(body: ChatBody, tokenizer: Tokenizer, parser: ToolParserChoice) -> ToolPlan:
    """Raises InvalidRequest."""
    tools = body.tools or []
    choice, name = _choice(body.tool_choice, tools)
    if choice is Choice.NONE:
        return NO_TOOLS
    definitions = tool_definitions(tools)
    template = tokenizer.chat_template
    is_parallel = body.parallel_tool_calls is not False
    plan = ToolPlan(
        tools=definitions,
        choice=choice,
        name=name,
        family=family_of(template.source, parser)
        if template is not None and template.uses_tools
        else ToolFamily.HERMES,
        is_parallel=is_parallel,
        parameters={tool.function.name: _properties(tool) for tool in tools},
        forced=_forced(choice, name, tools, is_one=not is_parallel),
    )
    return plan


def tool_definitions(tools: Sequence[ToolBody]) -> tuple[Mapping[str, object], ...]:
    """For the prompt, as clients send them. Raises InvalidRequest."""
    for index, tool in enumerate(tools):
        check_depth(tool.function.parameters, f"tools.{index}.function.parameters")
        check_depth(tool.function.model_extra, f"tools.{index}.function")
    return tuple(tool.model_dump(exclude_none=True) for tool in tools)


def _choice(choice: object, tools: list[ToolBody]) -> tuple[Choice, str]:
    match choice:
        case None | "auto":
            return (Choice.AUTO if tools else Choice.NONE), ""
        case "none":
            return Choice.NONE, ""
        case "required":
            _need_tools(tools)
            return Choice.REQUIRED, ""
        case {"type": "function", "function": {"name": str(name)}}:
            _need_tools(tools)
            if all(tool.function.name != name for tool in tools):
                raise InvalidRequest(
                    f"tool_choice names the function {shorten(name)}, which is not among tools",
                    param="tool_choice",
                )
            return Choice.NAMED, name
    raise InvalidRequest(
        'tool_choice must be "none", "auto", "required" or {"type": "function", "function": '
        f'{{"name": ...}}}}, got {describe(choice)}',
        param="tool_choice",
    )


def _need_tools(tools: list[ToolBody]) -> None:
    if not tools:
        raise InvalidRequest("tool_choice asks for a call, and tools is empty", param="tool_choice")


def _forced(choice: Choice, name: str, tools: list[ToolBody], *, is_one: bool) -> Wanted | None:
    functions = [(tool.function.name, tool.function.parameters) for tool in tools]
    match choice:
        case Choice.NAMED:
            schema = named_schema(dict(functions)[name])
        case Choice.REQUIRED:
            schema = list_schema(functions, is_one=is_one)
        case _:
            return None
    try:
        return Wanted(StructuredSpec(StructuredKind.JSON_SCHEMA, schema), "tools")
    except InvalidRequest as error:
        raise named(error, "tools") from None


def _properties(tool: ToolBody) -> Mapping[str, object]:
    properties = (tool.function.parameters or {}).get("properties")
    return properties if isinstance(properties, dict) else {}
