"""Each grammar is compiled once, off the engine's thread, and few are kept."""

from __future__ import annotations

import gc
import threading

import llguidance
import pytest

from baton.core.clock import ManualClock
from baton.core.errors import InvalidRequest
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.grammar.compiler import GrammarCompiler
from baton.engine.grammar.gate import COMPILE_TIMEOUT_S, GrammarGate
from baton.engine.sequence import Sequence

WAIT_S = 60.0


def spec(text: str) -> StructuredSpec:
    return StructuredSpec(StructuredKind.REGEX, text)


def byte_tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def sequence(text: str, eos: tuple[int, ...] = (256,)) -> Sequence:
    params = SamplingParams(structured=spec(text))
    return Sequence(GenerateRequest(RequestId("r"), Work.GENERATE, (1,), params, eos_token_ids=eos))


def test_compiles_once_and_loads_the_vocabulary_once() -> None:
    loads: list[int] = []

    def load() -> llguidance.LLTokenizer:
        loads.append(threading.get_ident())
        return byte_tokenizer()

    compiler = GrammarCompiler(load)
    assert loads == []
    first = compiler.start(spec("a"))
    assert compiler.start(spec("a")) is first
    other = compiler.start(spec("b"))
    assert first.result(WAIT_S) is not other.result(WAIT_S)
    assert len(loads) == 1 and loads[0] != threading.get_ident()


def test_forgets_what_was_asked_for_longest_ago() -> None:
    compiler = GrammarCompiler(byte_tokenizer, capacity=2)
    a, b = (compiler.start(spec(text)) for text in "ab")
    assert compiler.start(spec("a")) is a
    compiler.start(spec("c")).result(WAIT_S)
    assert compiler.start(spec("a")) is a
    assert compiler.start(spec("b")) is not b


def test_vocabulary_that_cannot_be_read_is_tried_again() -> None:
    loads: list[int] = []

    def load() -> llguidance.LLTokenizer:
        loads.append(1)
        if len(loads) == 1:
            raise OSError("gone")
        return byte_tokenizer()

    compiler = GrammarCompiler(load)
    with pytest.raises(OSError, match="gone"):
        compiler.start(spec("a")).result(WAIT_S)
    compiler.start(spec("a")).result(WAIT_S)
    compiler.start(spec("b")).result(WAIT_S)
    assert len(loads) == 2


def test_threads_end_with_their_compiler() -> None:
    before = set(threading.enumerate())
    compiler = GrammarCompiler(byte_tokenizer)
    compiler.start(spec("a")).result(WAIT_S)
    started = set(threading.enumerate()) - before
    assert started and all(thread.daemon for thread in started)
    del compiler
    gc.collect()
    for thread in started:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_gate_opens_when_the_grammar_has_come() -> None:
    released = threading.Event()

    def load() -> llguidance.LLTokenizer:
        released.wait(WAIT_S)
        return byte_tokenizer()

    gate = GrammarGate(GrammarCompiler(load), ManualClock())
    waiting, gone, broken = sequence("a"), sequence("a"), sequence("(")
    for each in (waiting, gone, broken):
        gate.admit(each)
        assert each.awaits_grammar and not each.may_go_on
    gate.forget(gone)
    assert gate.settle() == []
    released.set()
    failed = []
    for _ in range(int(WAIT_S / 0.002)):
        gate.pause()
        failed += gate.settle()
        if failed and waiting.grammar is not None:
            break
    assert not waiting.awaits_grammar and waiting.may_go_on
    assert gone.grammar is None
    assert [(each, error.param) for each, error in failed] == [(broken, "structured")]


def test_gate_gives_up_in_time() -> None:
    released = threading.Event()

    def load() -> llguidance.LLTokenizer:
        released.wait(WAIT_S)
        return byte_tokenizer()

    clock = ManualClock()
    gate = GrammarGate(GrammarCompiler(load), clock)
    waiting = sequence("a")
    gate.admit(waiting)
    clock.advance(COMPILE_TIMEOUT_S - 0.1)
    assert gate.settle() == []
    clock.advance(0.2)
    ((failed, error),) = gate.settle()
    assert failed is waiting and "not compiled within" in str(error)
    assert gate.settle() == []
    released.set()


def test_gate_refuses_where_nothing_could_end() -> None:
    for gate, each in (
        (GrammarGate(None, ManualClock()), sequence("a")),
        (GrammarGate(GrammarCompiler(byte_tokenizer), ManualClock()), sequence("a", eos=())),
    ):
        with pytest.raises(InvalidRequest, match="no structured outputs"):
            gate.admit(each)
