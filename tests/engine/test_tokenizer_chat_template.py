"""Chat templates: what a template may use, and what happens when it refuses."""

from __future__ import annotations

from datetime import datetime

import pytest

from baton.core.errors import ConfigError, InvalidRequest
from baton.engine.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: object = HELLO, **options: bool) -> str:
    template = ChatTemplate(
        source, special_tokens={"bos_token": "<s>"}, now=lambda: datetime(2024, 7, 26)
    )
    return template.render(messages, **options)  # type: ignore[arg-type]


def test_messages_special_tokens_and_generation_prompt_are_in_scope() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{% endfor %}" \
        "{% if add_generation_prompt %}>{% endif %}"  # fmt: skip
    assert render(source) == "<s>user:hello>"
    assert render(source, add_generation_prompt=False) == "<s>user:hello"


def test_block_lines_leave_no_whitespace() -> None:
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(source) == "hello\n"


def test_loop_controls_work() -> None:
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "01"


def test_generation_blocks_render_their_body() -> None:
    assert render("a{% generation %}b{{ 1 + 1 }}{% endgeneration %}c") == "ab2c"


def test_tojson_keeps_text_as_it_is() -> None:
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


def test_date_comes_from_the_given_clock() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


def test_refusal_of_the_template_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize("content", [None, 7, ["part"]])
def test_content_of_an_unexpected_type_is_an_invalid_request(content: object) -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        render("{{ 'x' + messages[0]['content'] }}", [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_templates_cannot_reach_out_of_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


def test_broken_template_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        render("{% for %}")
