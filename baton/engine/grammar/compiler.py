"""Grammars of one model, compiled once each on threads of their own.

    start ─► cached? ─► done at once
              └─► queued ─► thread: [vocabulary, the first time] ─► compile ─► cached

What nobody has asked for longest is forgotten beyond `capacity`; sequences keep what they use. A
specification that cannot be compiled is remembered too; a vocabulary that cannot be read is not.
`start` comes from one thread; the threads compile outside the interpreter lock.

Not known here: sequences, time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import llguidance

from baton.core.errors import InvalidRequest
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.grammar.daemons import DaemonThreads
from baton.engine.grammar.digit_runs import DigitRuns
from baton.engine.grammar.spec import compile_grammar
from baton.engine.grammar.token_grammar import CompiledGrammar

NUM_THREADS = 2
"""One slow grammar leaves the others a thread."""
CAPACITY = 128
"""A compiled grammar takes 10 kB to some MB."""

JSON_KINDS = (StructuredKind.JSON_SCHEMA, StructuredKind.JSON_OBJECT)


class GrammarCompiler:
    def __init__(
        self, load_tokenizer: Callable[[], llguidance.LLTokenizer], *, capacity: int = CAPACITY
    ) -> None:
        """`load_tokenizer` is called on a thread, with the first specification; what it raises is
        the fate of that specification alone."""
        self._load_tokenizer = load_tokenizer
        self._capacity = capacity
        self._vocabulary: Future[_Vocabulary] | None = None
        self._threads: DaemonThreads | None = None
        self._compiled: OrderedDict[StructuredSpec, Future[CompiledGrammar]] = OrderedDict()

    def start(self, spec: StructuredSpec) -> Future[CompiledGrammar]:
        """The grammar at its first token, not to be advanced: copies of it are.

        Its exception is an InvalidRequest, or whatever loading the vocabulary raised.
        """
        found = self._compiled.get(spec)
        if found is None or _may_come_right(found):
            found = self._compiled[spec] = self._submit(spec)
        self._compiled.move_to_end(spec)
        while len(self._compiled) > self._capacity:
            self._compiled.popitem(last=False)
        return found

    def _submit(self, spec: StructuredSpec) -> Future[CompiledGrammar]:
        if self._threads is None:
            self._threads = DaemonThreads(NUM_THREADS, "grammar")
        if self._vocabulary is None or (self._vocabulary.done() and self._vocabulary.exception()):
            load = self._load_tokenizer
            self._vocabulary = self._threads.submit(lambda: _vocabulary(load))
        vocabulary = self._vocabulary
        return self._threads.submit(lambda: _compile(spec, vocabulary.result()))


class _Vocabulary(NamedTuple):
    tokenizer: llguidance.LLTokenizer
    digits: DigitRuns


def _vocabulary(load_tokenizer: Callable[[], llguidance.LLTokenizer]) -> _Vocabulary:
    tokenizer = load_tokenizer()
    return _Vocabulary(tokenizer, DigitRuns(tokenizer))


def _compile(spec: StructuredSpec, vocabulary: _Vocabulary) -> CompiledGrammar:
    digits = vocabulary.digits if spec.kind in JSON_KINDS else None
    return CompiledGrammar(compile_grammar(spec, vocabulary.tokenizer), digits)


def _may_come_right(compiled: Future[CompiledGrammar]) -> bool:
    """It failed, and not because of the specification."""
    if not compiled.done():
        return False
    error = compiled.exception()
    return error is not None and not isinstance(error, InvalidRequest)
