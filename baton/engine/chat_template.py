"""Render chat messages with the Jinja template that a model folder brings along.

The environment is the one such templates are written for: sandboxed and immutable, block lines
trimmed, `break` / `continue`, `raise_exception`, `strftime_now`, a `tojson` that keeps non-ASCII
text, and `{% generation %}` blocks, which mark assistant text for training and mean nothing here.
Source: https://huggingface.co/docs/transformers/chat_templating_writing

Does not know: tokens, files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.core.errors import ConfigError, InvalidRequest

_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What expressions of a template raise over messages they were not written for."""


class ChatTemplate:
    """A compiled template. Raises ConfigError when the source is not valid Jinja."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are template variables such as bos_token; `now` feeds strftime_now."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
            self.uses_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
            """It writes tool definitions into the prompt."""
        except TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text. `variables`: more of them, for templates that know them; those named
        here win. Raises InvalidRequest when the template refuses the messages."""
        values: dict[str, object] = {
            "documents": None,
            **(variables or {}),
            **self._special_tokens,
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except _REFUSALS as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _environment(now: Callable[[], datetime]) -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter: no HTML escapes, since a prompt is no HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _GenerationBlock(Extension):
    """`{% generation %} body {% endgeneration %}` renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the type of the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
