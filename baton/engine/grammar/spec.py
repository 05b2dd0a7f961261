"""What a structured output asks for, as a grammar of the library that compiles it.

A specification comes from a client and may be hostile: its size, what compiling it may cost and
what one token may cost are bounded, and every refusal says what is wrong in one line.

Not known here: vocabularies of models, sequences, threads, processes. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from baton.core.errors import InvalidRequest
from baton.core.structured import StructuredKind, StructuredSpec

MAX_MULTIPLE_OF = 100_000
"""The automaton of multiples of n has n states, that of several conditions as many as their least
common multiple; the library builds all of it at once. A million take seconds and 300 MB."""
MAX_ERROR_CHARS = 300
WHITESPACE = r"\n?[ ]{0,32}|\n?\t{0,8}"
"""Between the parts of a JSON value. Bounded: a model must not go on with blanks for ever."""
COMBINED_KEYWORDS = ("pattern", "multipleOf", "propertyNames", "\\u")
"""Of schemas; the last may spell any of the others."""
COMBINING_SIGNS = ("&", "~")
"""Of terminals in Lark: both, and not."""
GBNF_SIGN = "::="
SCHEMA_DIRECTIVE = "%json"
LIBRARY_DIRECTIVE = "%llguidance"
DEAD_END = "NoExtension"
BYTES_TOKENIZER = "byte"
"""The library's own: one token per byte."""


def parser_limits() -> llguidance.LLParserLimits:
    """What compiling and each mask may cost; by the library's own figures 20 ms and 10 ms."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_items_in_row=10_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def validate_in_process(spec: StructuredSpec) -> None:
    """Compile for bytes, without a model, and throw the result away.

    Takes a millisecond, for what comes near the limits up to a few hundred, outside the interpreter
    lock; for what `is_costly` perhaps for ever. Raises InvalidRequest with the reason.
    """
    tokenizer = llguidance.LLTokenizer(BYTES_TOKENIZER)
    matcher = compile_grammar(spec, tokenizer)
    check_matcher(spec, matcher)


def is_costly(spec: StructuredSpec) -> bool:
    """May combine automata, whose states multiply and which the library's limits do not count."""
    match spec.kind:
        case StructuredKind.JSON_SCHEMA:
            return any(word in spec.text for word in COMBINED_KEYWORDS)
        case StructuredKind.GRAMMAR:
            return any(word in spec.text for word in (*COMBINED_KEYWORDS, *COMBINING_SIGNS))
        case _:
            return False


def compile_grammar(
    spec: StructuredSpec, tokenizer: llguidance.LLTokenizer
) -> llguidance.LLMatcher:
    """At the first token, with its mask computed once: what copies of it need is there then.

    Raises InvalidRequest.
    """
    matcher = llguidance.LLMatcher(
        tokenizer, library_grammar(spec), log_level=0, limits=parser_limits()
    )
    check_matcher(spec, matcher)
    matcher.compute_bitmask()
    check_matcher(spec, matcher)
    return matcher


def check_matcher(spec: StructuredSpec, matcher: llguidance.LLMatcher) -> None:
    """Raises InvalidRequest for a matcher that is in error."""
    if matcher.is_error():
        raise refusal(spec, matcher.get_error())


def refusal(spec: StructuredSpec, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"structured output {spec.kind.value} cannot be used: {one_line(reason)}",
        param="structured",
    )


def one_line(reason: str) -> str:
    """Without the library's drawings of the place."""
    text = " ".join(reason.replace("<non-verbose/>", "").split())
    if text.startswith(DEAD_END):
        return "nothing can match it"
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."


def library_grammar(spec: StructuredSpec) -> str:
    """Raises InvalidRequest for what is wrong before any grammar is compiled."""
    matcher = llguidance.LLMatcher
    match spec.kind:
        case StructuredKind.JSON_OBJECT:
            return _of_schema({"type": "object"})
        case StructuredKind.JSON_SCHEMA:
            return _of_schema(_parsed_schema(spec))
        case StructuredKind.REGEX:
            return matcher.grammar_from_regex(spec.text)
        case StructuredKind.CHOICE:
            return matcher.grammar_from_regex("|".join(map(_pattern_of, spec.choices)))
        case StructuredKind.GRAMMAR:
            return matcher.grammar_from_lark(_lark_of(spec))


def _pattern_of(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _lark_of(spec: StructuredSpec) -> str:
    lark = spec.text
    if LIBRARY_DIRECTIVE in lark:
        raise refusal(spec, f"{LIBRARY_DIRECTIVE} is not taken in grammars")
    if GBNF_SIGN in lark:
        try:
            lark = gbnf_to_lark(lark)
        except Exception as error:
            # The converter raises whatever its own parsing runs into.
            raise refusal(spec, f"it is not valid GBNF: {error}") from error
    first, *others = lark.split(SCHEMA_DIRECTIVE)
    return first + "".join(SCHEMA_DIRECTIVE + _with_checked_schema(spec, o) for o in others)


def _with_checked_schema(spec: StructuredSpec, text: str) -> str:
    """`text` follows a directive that embeds a schema; the schema is written anew."""
    start = len(text) - len(text.lstrip())
    try:
        schema, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise refusal(spec, f"{SCHEMA_DIRECTIVE} is not followed by JSON: {error}") from error
    _check_multiples(spec, schema)
    return " " + json.dumps(schema) + text[end:]


def _of_schema(schema: dict[str, Any]) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE}
    )


def _parsed_schema(spec: StructuredSpec) -> dict[str, Any]:
    try:
        schema = json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        raise refusal(spec, f"it is not valid JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise refusal(spec, f"a schema is an object or a boolean, got {type(schema).__name__}")
    if schema is False:
        raise refusal(spec, "the schema false allows no value")
    _check_multiples(spec, schema)
    # Options apply to objects alone.
    return {} if schema is True else schema


def _check_multiples(spec: StructuredSpec, schema: object) -> None:
    """Raises InvalidRequest when all multipleOf of a schema together would take too many states.

    As if all applied to one number: which of them do is known to the library alone.
    """
    numbers = {Fraction(str(number)) for number in _multiples(schema)}
    scale = math.lcm(*(number.denominator for number in numbers))
    common = math.lcm(*(int(abs(number) * scale) for number in numbers))
    if common > MAX_MULTIPLE_OF:
        raise refusal(
            spec,
            f"the least common multiple of its multipleOf, in units of their last digit, is "
            f"{common:.3g}; at most {MAX_MULTIPLE_OF} can be used: take rounder or fewer numbers",
        )


def _multiples(schema: object) -> Iterator[float]:
    """Every number under a key `multipleOf`, at any depth; no recursion."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            number = node.get("multipleOf")
            if isinstance(number, int | float) and math.isfinite(number):
                yield number
            stack += node.values()
        elif isinstance(node, list):
            stack += node
