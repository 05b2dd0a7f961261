"""Which way of writing calls a model has learned, and the parser for it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from services.router.edge.edge_config import ToolParserChoice
from services.router.openai_api.tools.deepseek import ALL_BEGIN, DeepseekParser
from services.router.openai_api.tools.hermes import HermesParser
from services.router.openai_api.tools.llama3_json import TAG, Llama3JsonParser
from services.router.openai_api.tools.mistral import MARK, MistralParser
from services.router.openai_api.tools.pythonic import PythonicParser
from services.router.openai_api.tools.qwen_xml import QwenXmlParser
from services.router.openai_api.tools.tool_events import ToolParser


class ToolFamily(Enum):
    """As in the setting edge.tool_parser."""

    HERMES = ToolParserChoice.HERMES.value
    QWEN_XML = ToolParserChoice.QWEN_XML.value
    LLAMA3_JSON = ToolParserChoice.LLAMA3_JSON.value
    MISTRAL = ToolParserChoice.MISTRAL.value
    PYTHONIC = ToolParserChoice.PYTHONIC.value
    DEEPSEEK = ToolParserChoice.DEEPSEEK.value

    @property
    def needs_special_tokens(self) -> bool:
        """Its marks are special tokens, which are not shown otherwise."""
        return self in (ToolFamily.MISTRAL, ToolFamily.DEEPSEEK, ToolFamily.LLAMA3_JSON)

    @property
    def id_chars(self) -> int | None:
        """Its template takes ids of just so many letters and digits."""
        return 9 if self is ToolFamily.MISTRAL else None


# What each chat template has in it, the most telling first.
_MARKS = (
    ("<function=", ToolFamily.QWEN_XML),
    (ALL_BEGIN, ToolFamily.DEEPSEEK),
    (MARK, ToolFamily.MISTRAL),
    ("<tool_call>", ToolFamily.HERMES),
    ("<|python_start|>", ToolFamily.PYTHONIC),
    ("func_name1(", ToolFamily.PYTHONIC),
    (TAG, ToolFamily.LLAMA3_JSON),
    ('{"name": function name, "parameters"', ToolFamily.LLAMA3_JSON),
)


def family_of(chat_template: str, choice: ToolParserChoice) -> ToolFamily:
    """Hermes' way is the most common one, and the one in which tools are spelled out to models
    whose template knows none."""
    if choice is not ToolParserChoice.AUTO:
        return ToolFamily(choice.value)
    return next((family for mark, family in _MARKS if mark in chat_template), ToolFamily.HERMES)


def new_parser(family: ToolFamily, parameters: Mapping[str, Mapping[str, object]]) -> ToolParser:
    """`parameters`: each tool's properties, by name."""
    match family:
        case ToolFamily.HERMES:
            return HermesParser()
        case ToolFamily.QWEN_XML:
            return QwenXmlParser(parameters)
        case ToolFamily.LLAMA3_JSON:
            return Llama3JsonParser()
        case ToolFamily.MISTRAL:
            return MistralParser()
        case ToolFamily.PYTHONIC:
            return PythonicParser()
        case ToolFamily.DEEPSEEK:
            return DeepseekParser()
