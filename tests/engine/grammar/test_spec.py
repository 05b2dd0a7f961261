"""Specifications as clients send them: what is taken, what is refused and how fast."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from baton.core.errors import InvalidRequest
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.grammar.check import validate_aside
from baton.engine.grammar.spec import (
    MAX_ERROR_CHARS,
    compile_grammar,
    is_costly,
    validate_in_process,
)
from baton.engine.grammar.validate import validate_structured

SCHEMA, OBJECT = StructuredKind.JSON_SCHEMA, StructuredKind.JSON_OBJECT
REGEX, GRAMMAR = StructuredKind.REGEX, StructuredKind.GRAMMAR
CHOICES = ["a", "ab", '"q"', "b\\c", "new\nline", "größe", "\U0001f600", "/x/", "\x01", "%json {}"]


def accepts(spec: StructuredSpec, text: str) -> bool:
    """The whole text, and it may end there."""
    matcher = compile_grammar(spec, llguidance.LLTokenizer("byte"))
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


def schema(value: Any) -> StructuredSpec:
    return StructuredSpec(SCHEMA, json.dumps(value))


TAKEN: list[tuple[StructuredSpec, list[str], list[str]]] = [
    (
        StructuredSpec(OBJECT),
        ["{}", '{"a": [1, {"b": null}]}', '{\n  "a": 1\n}'],
        ["[]", "1", '{"a"}', "{" + " " * 40 + "}", "{\n\n}"],
    ),
    (schema(True), ["1", '"x"', "{}"], ["x"]),
    (
        schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
        ['{"a": 1}', '{"a": -12, "b": "more"}'],
        ["{}", '{"a": "1"}', '{"a": 1.5}'],
    ),
    (schema({"type": "number", "multipleOf": 0.25}), ["0.50", "3"], ["0.30"]),
    (StructuredSpec(REGEX, r"\d{3}-[a-c]+|x"), ["123-abc", "x"], ["12-a", "123-", "xx"]),
    (StructuredSpec.of_choices(CHOICES), CHOICES, ["b", "abc", ""]),
    (
        StructuredSpec(GRAMMAR, '?start: sum\n?sum: num ("+" num)*\nnum: /[0-9]+/'),
        ["1+22", "3"],
        ["+", "1+"],
    ),
    (StructuredSpec(GRAMMAR, 'root ::= "yes" | "no" [0-9]'), ["yes", "no7"], ["no"]),
    (
        StructuredSpec(GRAMMAR, 'start: "<call>" %json {"type": "integer"} "</call>"'),
        ["<call>12</call>"],
        ["<call></call>"],
    ),
]


@pytest.mark.parametrize(("spec", "good", "bad"), TAKEN, ids=lambda v: str(v)[:40])
def test_is_taken_and_means_what_it_says(
    spec: StructuredSpec, good: list[str], bad: list[str]
) -> None:
    validate_in_process(spec)
    assert [text for text in good if not accepts(spec, text)] == []
    assert [text for text in bad if accepts(spec, text)] == []


REFUSED: list[tuple[StructuredSpec, str]] = [
    (StructuredSpec(SCHEMA, "{"), "not valid JSON"),
    (StructuredSpec(SCHEMA, "[" * 50_000), "not valid JSON"),
    (schema([1]), "an object or a boolean"),
    (schema(False), "allows no value"),
    (schema({"type": "foo"}), "Invalid type"),
    (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (schema({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
    (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "nothing can match"),
    (schema({"type": "integer", "multipleOf": 999_983}), "least common multiple"),
    (
        schema({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}], "type": "integer"}),
        "least common multiple",
    ),
    (StructuredSpec(REGEX, "(a"), "regex parse error"),
    (StructuredSpec(REGEX, "(?=a)b"), "look-around"),
    (StructuredSpec(REGEX, "[a&&[^a]]"), "nothing can match"),
    (StructuredSpec(GRAMMAR, "start: foo"), "unknown name"),
    (StructuredSpec(GRAMMAR, "hello"), "Expected token"),
    (StructuredSpec(GRAMMAR, "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deeply nested"),
    (StructuredSpec(GRAMMAR, "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000), "GBNF"),
    (StructuredSpec(GRAMMAR, '%llguidance {}\nstart: "a"'), "not taken"),
    (
        StructuredSpec(GRAMMAR, 'start: %json {"\\u006dultipleOf": 99999989, "type": "integer"}'),
        "least common multiple",
    ),
    (StructuredSpec(GRAMMAR, "start: %json {"), "not followed by JSON"),
    (StructuredSpec(StructuredKind.CHOICE, "[1]"), "array of strings"),
]


@pytest.mark.parametrize(("spec", "reason"), REFUSED, ids=lambda v: str(v)[:50])
def test_is_refused_in_one_line_that_says_why(spec: StructuredSpec, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        validate_in_process(spec)
    assert caught.value.param == "structured"
    message = str(caught.value)
    assert "\n" not in message and len(message) < MAX_ERROR_CHARS + 100


def test_combined_automata_are_given_up_in_time() -> None:
    words = " & ".join(f"/([01]{{{n}}})*/" for n in (1997, 1993, 1987))
    spec = StructuredSpec(GRAMMAR, f"start: A\nA: {words}")
    assert is_costly(spec)
    with pytest.raises(InvalidRequest, match="more than 1 s or 2048 MiB") as caught:
        validate_aside(spec, max_cpu_s=1)
    assert caught.value.param == "structured"


def test_combined_patterns_that_are_small_are_taken() -> None:
    validate_structured(schema({"type": "string", "pattern": "^[a-z]+$", "maxLength": 8}))
    with pytest.raises(InvalidRequest, match="regex parse error"):
        validate_structured(schema({"type": "string", "pattern": "("}))


HOSTILE = {
    "deep repeats": StructuredSpec(REGEX, "((a{0,300}b){0,300}c){0,300}"),
    "wide repeats": StructuredSpec(REGEX, r"(\w{1,50}\s?){1,100}"),
    "many words": StructuredSpec(REGEX, "|".join(f"{i}x.*{i}" for i in range(1000))),
    "exponential automaton": StructuredSpec(REGEX, "[^a]*a[^b]{30}(x|y).{12}"),
    "ambiguous": StructuredSpec(GRAMMAR, 'start: a\na: a a | "x" | '),
    "many conditions": schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for i in range(4)]}
                for j in range(10)
            ]
        }
    ),
    "many items": schema({"type": "array", "minItems": 100_000, "items": {"type": "integer"}}),
}


@pytest.mark.parametrize("spec", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_ones_end_one_way_or_the_other(spec: StructuredSpec) -> None:
    """Taken or refused; the time limit of the test is what would fail."""
    try:
        matcher = compile_grammar(spec, llguidance.LLTokenizer("byte"))
    except InvalidRequest:
        return
    for _ in range(20):
        mask = matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            return
        token_id = next(i for i in range(256) if mask[i // 8] >> (i % 8) & 1)
        matcher.consume_token(token_id)
