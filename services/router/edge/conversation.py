"""A conversation as the text of a prompt: the model's chat template, with tools and continuations.

Does not know: JSON bodies, tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from baton.core.errors import InvalidRequest
from baton.engine.tokenizer import Tokenizer
from services.router.openai_api.tools.spelled_out import spelled_out

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_VARIABLE_CHARS = 64 << 10
"""Of chat_template_kwargs as JSON."""

_CUT = "\ue000baton-cut\ue001"
"""Written behind a message that is to be continued, so that its end is found in the prompt."""

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What there is beside the messages."""

    tools: tuple[Message, ...] = ()
    """Definitions, as clients send them."""
    add_generation_prompt: bool = True
    """The prompt ends where the assistant's answer begins."""
    continues_final: bool = False
    """It ends with the last message instead, which the output continues."""
    variables: Mapping[str, object] = field(default_factory=dict)
    """More variables for the template."""

    @property
    def num_chars(self) -> int:
        """About what it adds to the prompt."""
        tools = sum(len(orjson.dumps(tool)) for tool in self.tools)
        return tools + (len(orjson.dumps(dict(self.variables))) if self.variables else 0)


PLAIN_CHAT = ChatOptions()


def check_messages(messages: Sequence[Message], options: ChatOptions) -> None:
    """Raises InvalidRequest."""
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            role = str(message["role"])
            shown = role if len(role) <= 80 else role[:80] + "..."
            raise InvalidRequest(
                f"role must be one of {', '.join(ROLES)}, got {shown!r}",
                param=f"messages.{index}.role",
            )
    if not messages:
        raise InvalidRequest("messages is empty; send at least one", param="messages")
    if options.continues_final and options.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt are both true; a prompt ends with "
            "the last message or with the beginning of a new one",
            param="continue_final_message",
        )
    if len(orjson.dumps(dict(options.variables))) > MAX_VARIABLE_CHARS:
        raise InvalidRequest(
            f"chat_template_kwargs takes at most {MAX_VARIABLE_CHARS} characters of JSON",
            param="chat_template_kwargs",
        )


def rendered(tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions) -> str:
    """The prompt's text; the template writes BOS itself if it wants it. Raises InvalidRequest."""
    messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    if options is PLAIN_CHAT and not any(
        m["role"] == "tool" or "tool_calls" in m for m in messages
    ):
        return tokenizer.apply_chat_template(messages)
    template = tokenizer.chat_template
    tools = options.tools
    if template is not None and not template.uses_tools:
        messages, tools = spelled_out(messages, tools), ()
    if not options.continues_final:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=options.add_generation_prompt,
            tools=tools,
            variables=options.variables,
        )
    last = {**messages[-1], "content": f"{messages[-1]['content']}{_CUT}"}
    text = tokenizer.apply_chat_template(
        [*messages[:-1], last],
        add_generation_prompt=False,
        tools=tools,
        variables=options.variables,
    )
    before, found, _ = text.rpartition(_CUT)
    if not found:
        raise InvalidRequest(
            "the model's chat template does not show the last message's content, so it cannot be "
            "continued; leave continue_final_message out",
            param="continue_final_message",
        )
    return before
