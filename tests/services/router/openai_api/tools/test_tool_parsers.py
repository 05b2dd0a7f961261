"""Calls found in what models of each family write, however the text is cut."""

from __future__ import annotations

import json
import random

import pytest

from services.router.edge.edge_config import ToolParserChoice
from services.router.openai_api.tools.deepseek import ALL_BEGIN, ALL_END, BEGIN, END, SEPARATOR
from services.router.openai_api.tools.families import ToolFamily, family_of, new_parser
from services.router.openai_api.tools.forced import ListParser, NamedParser, list_schema
from services.router.openai_api.tools.tool_events import (
    Arguments,
    CallBegun,
    Event,
    Text,
    ToolParser,
    joined,
)

WEATHER = ("weather", {"city": 'Par"is {x}', "days": [1, 2], "deep": {"a": None}})
CLOCK = ("clock", {})
PROPERTIES = {"weather": {"days": {"type": "array"}, "deep": {"type": "object"}}}


def as_json(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


def hermes(*calls) -> str:
    return "\n".join(f"<tool_call>\n{as_json(*call)}\n</tool_call>" for call in calls)


def deepseek(*calls) -> str:
    parts = [
        f"{BEGIN}function{SEPARATOR}{name}\n```json\n{json.dumps(arguments)}\n```{END}"
        for name, arguments in calls
    ]
    return ALL_BEGIN + "\n".join(parts) + ALL_END


def deepseek_short(*calls) -> str:
    parts = [f"{BEGIN}{name}{SEPARATOR}{json.dumps(arguments)}{END}" for name, arguments in calls]
    return ALL_BEGIN + "".join(parts) + ALL_END


def mistral(*calls) -> str:
    return "[TOOL_CALLS] [" + ", ".join(as_json(*call) for call in calls) + "]"


def mistral_named(*calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(args)}" for name, args in calls)


def qwen_xml(*calls) -> str:
    written = []
    for name, arguments in calls:
        parameters = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n"
            "</parameter>\n"
            for key, value in arguments.items()
        )
        written.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(written)


def pythonic(*calls) -> str:
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    return f"[{', '.join(written)}]"


def llama3(*calls) -> str:
    return "; ".join(as_json(*call, "parameters") for call in calls)


WRITERS = [
    (ToolFamily.HERMES, hermes),
    (ToolFamily.QWEN_XML, qwen_xml),
    (ToolFamily.LLAMA3_JSON, llama3),
    (ToolFamily.LLAMA3_JSON, lambda *calls: "<|python_tag|>" + llama3(*calls)),
    (ToolFamily.MISTRAL, mistral),
    (ToolFamily.MISTRAL, mistral_named),
    (ToolFamily.PYTHONIC, pythonic),
    (ToolFamily.DEEPSEEK, deepseek),
    (ToolFamily.DEEPSEEK, deepseek_short),
]
TAKES_TEXT_BEFORE = (
    ToolFamily.HERMES, ToolFamily.QWEN_XML, ToolFamily.MISTRAL, ToolFamily.DEEPSEEK,
)  # fmt: skip


def fresh(family: ToolFamily) -> ToolParser:
    return new_parser(family, PROPERTIES)


def parsed(parser: ToolParser, parts: list[str]) -> list[Event]:
    events: list[Event] = []
    for part in parts:
        events += parser.push(part)
    return joined([*events, *parser.finish()])


def calls_of(events: list[Event]) -> list[tuple[str, object]]:
    names = [e.name for e in events if isinstance(e, CallBegun)]
    texts = ["".join(e.text for e in events if e[0] == i and isinstance(e, Arguments))
             for i in range(len(names))]  # fmt: skip
    return [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


def text_of(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Text))


def pieces(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(0, 12))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize(("family", "write"), WRITERS)
@pytest.mark.parametrize("calls", [(WEATHER,), (CLOCK,), (WEATHER, CLOCK), (CLOCK, WEATHER, CLOCK)])
def test_calls_are_found_and_nothing_is_left_of_them(family, write, calls):
    events = parsed(fresh(family), [write(*calls)])
    assert calls_of(events) == list(calls)
    assert text_of(events) == ""


@pytest.mark.parametrize(("family", "write"), [w for w in WRITERS if w[0] in TAKES_TEXT_BEFORE])
def test_text_before_calls_is_shown(family, write):
    events = parsed(fresh(family), ["Let me look.\n\n" + write(WEATHER)])
    assert events[0] == Text("Let me look.")
    assert calls_of(events) == [WEATHER]


NOT_CALLS = [
    "Hello, world", "", " \n", "a < b and <tool", "<tool_call>", "<tool_call>nothing</tool_call>",
    '<tool_call>\n{"nam": 1}\n</tool_call>', '{"answer": 5}', '{"name": 5}', "{}", '{"name": "x"',
    "[1, 2, 3]", "[", "[look", "[f(1)]", "[f(x=g())]", "[TOOL_", "[TOOL_CALLS]", "[TOOL_CALLS] x",
    "[TOOL_CALLS] [5]", BEGIN + "function", ALL_BEGIN[:5], "<|python", "tail \n",
]  # fmt: skip


@pytest.mark.parametrize("family", ToolFamily)
@pytest.mark.parametrize("text", NOT_CALLS)
def test_what_is_no_call_is_text(family, text):
    events = parsed(fresh(family), [text])
    if any(isinstance(e, CallBegun) for e in events):
        # Cut off behind its name, which nobody can take back.
        assert family is ToolFamily.LLAMA3_JSON and text == '{"name": "x"'
        return
    shown = text_of(events)
    assert shown.strip() == text.strip() or family is ToolFamily.DEEPSEEK


@pytest.mark.parametrize("seed", range(40))
def test_result_does_not_depend_on_how_the_text_was_cut(seed):
    rng = random.Random(seed)
    for family, write in WRITERS:
        text = rng.choice(NOT_CALLS) + write(WEATHER, CLOCK) + rng.choice(["", "\n", " so"])
        for whole in (text, write(CLOCK, WEATHER), rng.choice(NOT_CALLS), text[: len(text) // 2]):
            wanted = parsed(fresh(family), [whole])
            assert parsed(fresh(family), list(whole)) == wanted
            assert parsed(fresh(family), pieces(whole, rng)) == wanted


def test_arguments_stream_as_they_come():
    parser = fresh(ToolFamily.HERMES)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": {"a": "lo') == [
        CallBegun(0, "f"),
        Arguments(0, '{"a": "lo'),
    ]
    assert parser.push('ng"}') == [Arguments(0, 'ng"}')]
    assert parser.push("}\n</tool_call>") == []


def test_arguments_may_come_first_be_missing_or_be_text():
    for written, wanted in [
        ('{"arguments": {"a": 1}, "name": "f"}', {"a": 1}),
        ('{"name": "f"}', {}),
        ('{"type": "function", "name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
    ]:
        events = parsed(fresh(ToolFamily.HERMES), list(f"<tool_call>{written}</tool_call>"))
        assert calls_of(events) == [("f", wanted)]


def test_call_cut_off_in_its_arguments_shows_what_there_is():
    events = parsed(fresh(ToolFamily.HERMES), ['<tool_call>{"name": "f", "arguments": {"a": '])
    assert events == [CallBegun(0, "f"), Arguments(0, '{"a": ')]


def test_forced_calls():
    assert parsed(NamedParser("f"), ['{"a"', ": 1}"]) == [
        CallBegun(0, "f"),
        Arguments(0, '{"a": 1}'),
    ]
    written = json.dumps([{"name": name, "parameters": args} for name, args in (WEATHER, CLOCK)])
    for parts in ([written], list(written)):
        assert calls_of(parsed(ListParser(), parts)) == [WEATHER, CLOCK]


def test_schema_of_a_list_of_calls_hoists_definitions():
    point = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {}}}
    schema = json.loads(list_schema([("a", point), ("b", None)], is_one=True))
    assert schema["$defs"] == {"P": {}}
    assert schema["maxItems"] == 1
    assert "$defs" not in schema["items"]["anyOf"][0]["properties"]["parameters"]


@pytest.mark.parametrize(
    ("mark", "family"),
    [
        ("<tool_call>{{ call | tojson }}</tool_call>", ToolFamily.HERMES),
        ("<tool_call><function={{ name }}>", ToolFamily.QWEN_XML),
        ("[TOOL_CALLS]", ToolFamily.MISTRAL),
        (ALL_BEGIN, ToolFamily.DEEPSEEK),
        ("[func_name1(params)]", ToolFamily.PYTHONIC),
        ("<|python_tag|>", ToolFamily.LLAMA3_JSON),
        ("{{ messages }}", ToolFamily.HERMES),
    ],
)
def test_family_is_read_off_the_chat_template(mark, family):
    assert family_of(f"{{{{ tools }}}} {mark}", ToolParserChoice.AUTO) is family
    assert family_of(mark, ToolParserChoice.PYTHONIC) is ToolFamily.PYTHONIC


def test_every_choice_is_a_family():
    assert {c.value for c in ToolParserChoice} == {f.value for f in ToolFamily} | {"auto"}
