"""Numbers come to an end; what needs its digits keeps them."""

from __future__ import annotations

import json

import llguidance
import numpy as np
import pytest

from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.grammar.compiler import GrammarCompiler
from baton.engine.grammar.digit_runs import MAX_RUN
from baton.engine.grammar.token_grammar import TokenGrammar, fill_masks


def longest_run(schema: object) -> int:
    """Digits that a model would get out which takes nothing else while it can."""
    spec = StructuredSpec(StructuredKind.JSON_SCHEMA, json.dumps(schema))
    compiler = GrammarCompiler(lambda: llguidance.LLTokenizer("byte"))
    grammar = TokenGrammar(compiler.start(spec).result(60))
    executor, output = llguidance.LLExecutor(1), list(b"1") if schema == {"type": "number"} else []
    for _ in range(100):
        words = np.zeros((1, 9), dtype=np.int32)
        grammar.advance(output)
        fill_masks(executor, [grammar], words)
        grammar.shorten(words[0])
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        possible = [b for b in b"0123456789" if bits[b]]
        if output and chr(output[-1]).isdigit() and not possible:
            return len(output)
        output.append(possible[-1] if possible else int(np.flatnonzero(bits)[0]))
    pytest.fail("no end")


def test_numbers_end() -> None:
    assert longest_run({"type": "number"}) == MAX_RUN


def test_patterns_get_their_digits() -> None:
    assert longest_run({"type": "string", "pattern": "^[0-9]{40}$"}) == 41
