"""Conversations as prompts: templates that know tools and templates that do not."""

from __future__ import annotations

import json

import pytest
import tokenizers

from baton.core.errors import InvalidRequest
from baton.engine.chat_template import ChatTemplate
from baton.engine.tokenizer import Tokenizer
from services.router.edge.conversation import ChatOptions, check_messages, rendered

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
ASKED = [
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "tool_call_id": "1"},
]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"
)


def tokenizer_of(source: str | None) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    template = None if source is None else ChatTemplate(source, special_tokens={"bos_token": "B"})
    return Tokenizer(backend, chat_template=template)


def test_whether_a_template_knows_tools_is_read_off_it():
    assert ChatTemplate(WITH_TOOLS, special_tokens={}).uses_tools
    assert not ChatTemplate(PLAIN, special_tokens={}).uses_tools
    assert not ChatTemplate("{% set tools = 1 %}{{ tools }}", special_tokens={}).uses_tools


def test_template_that_knows_tools_gets_them_as_they_are():
    text = rendered(tokenizer_of(WITH_TOOLS), ASKED, ChatOptions(tools=(TOOL,)))
    assert text == f"{json.dumps([TOOL])}[user]ask[assistant]é[tool]5[assistant]"


def test_template_without_tools_has_them_spelled_out():
    text = rendered(tokenizer_of(PLAIN), ASKED, ChatOptions(tools=(TOOL,)))
    assert text.startswith("[system]") and '{"name": "f"' in text
    assert '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>' in text
    assert text.endswith("[user]<tool_response>\n5\n</tool_response>")


def test_definitions_join_the_system_message_that_is_there():
    said = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "ask"}]
    text = rendered(tokenizer_of(PLAIN), said, ChatOptions(tools=(TOOL,)))
    assert text.startswith("[system]Be kind.\n\n") and text.count("[system]") == 1


def test_variables_reach_the_template_and_replace_none_of_its_own():
    said = [{"role": "user", "content": "ask"}]
    options = ChatOptions(variables={"mood": "!", "messages": [], "bos_token": "X"})
    assert rendered(tokenizer_of(WITH_TOOLS), said, options) == "[user]ask[assistant]!"
    options = ChatOptions(variables={"bos_token": "X"})
    assert rendered(tokenizer_of("{{ bos_token }}"), said, options) == "B"


@pytest.mark.parametrize(
    "source", [PLAIN, WITH_TOOLS, PLAIN.replace("m.content", "m.content|trim")]
)
def test_continued_message_ends_the_prompt(source):
    said = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "I say "}]
    options = ChatOptions(add_generation_prompt=False, continues_final=True)
    assert rendered(tokenizer_of(source), said, options) == "[user]ask[assistant]I say "


def test_template_that_hides_the_message_cannot_continue_it():
    options = ChatOptions(add_generation_prompt=False, continues_final=True)
    with pytest.raises(InvalidRequest, match="cannot be continued"):
        rendered(tokenizer_of("{{ messages | length }}"), ASKED[:1], options)


def test_without_a_template_there_is_no_conversation():
    with pytest.raises(InvalidRequest, match="no chat template"):
        rendered(tokenizer_of(None), ASKED, ChatOptions(tools=(TOOL,)))


def test_roles_are_checked():
    with pytest.raises(InvalidRequest, match="'king'"):
        check_messages([{"role": "king", "content": ""}], ChatOptions())
