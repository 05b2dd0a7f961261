"""Sequences whose grammar is being compiled; meanwhile the engine computes their prompts.

1. `admit`   a grammar that is there already is given to the sequence at once
2. `settle`  once a step: those whose grammar has come since may sample, those without one end
3. `forget`  the sequence has ended for another reason

Not known here: blocks, steps, how grammars are compiled. No torch.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple, Protocol

from baton.core.clock import Clock
from baton.core.errors import InvalidRequest
from baton.core.structured import StructuredSpec
from baton.engine.grammar.token_grammar import CompiledGrammar, TokenGrammar
from baton.engine.sequence import Sequence

COMPILE_TIMEOUT_S = 20.0
"""With the wait for a thread, and loading the vocabulary the first time."""
PAUSE_S = 0.002
"""How long an engine with nothing else to do waits before it looks for commands again."""


class Compiler(Protocol):
    def start(self, spec: StructuredSpec) -> Future[CompiledGrammar]: ...


class _Waiting(NamedTuple):
    compiled: Future[CompiledGrammar]
    until_s: float


class GrammarGate:
    def __init__(self, compiler: Compiler | None, clock: Clock) -> None:
        """No compiler: structured outputs are refused. `clock` is monotonic."""
        self._compiler = compiler
        self._clock = clock
        self._waiting: dict[Sequence, _Waiting] = {}

    @property
    def has_news(self) -> bool:
        """`settle` would find something; deadlines aside."""
        return any(waiting.compiled.done() for waiting in self._waiting.values())

    def admit(self, sequence: Sequence) -> None:
        """Raises InvalidRequest for a structured output that is known to be impossible."""
        spec = sequence.request.sampling.structured
        if spec is None:
            return
        if self._compiler is None or not sequence.request.eos_token_ids:
            raise InvalidRequest(
                "this model has no tokenizer or no end-of-sequence token, so it has no structured "
                "outputs; leave the parameter out",
                param="structured",
            )
        compiled = self._compiler.start(spec)
        if not compiled.done():
            sequence.awaits_grammar = True
            self._waiting[sequence] = _Waiting(compiled, self._clock.now() + COMPILE_TIMEOUT_S)
            return
        if (error := compiled.exception()) is not None:
            raise _as_refusal(error)
        sequence.grammar = TokenGrammar(compiled.result())

    def settle(self) -> list[tuple[Sequence, InvalidRequest]]:
        """Open the way for sequences whose grammar has come; those that will have none, and why."""
        if not self._waiting:
            return []
        failed: list[tuple[Sequence, InvalidRequest]] = []
        now_s = self._clock.now()
        for sequence, (compiled, until_s) in list(self._waiting.items()):
            if not compiled.done():
                if now_s < until_s:
                    continue
                failed.append((sequence, _timed_out()))
            elif (error := compiled.exception()) is not None:
                failed.append((sequence, _as_refusal(error)))
            else:
                sequence.grammar = TokenGrammar(compiled.result())
                sequence.awaits_grammar = False
            self.forget(sequence)
        return failed

    def pause(self) -> None:
        """Wait a moment for the first grammar to come; returns at once when none is awaited."""
        if self._waiting:
            awaited = [waiting.compiled for waiting in self._waiting.values()]
            wait(awaited, timeout=PAUSE_S, return_when=FIRST_COMPLETED)

    def forget(self, sequence: Sequence) -> None:
        self._waiting.pop(sequence, None)


def _as_refusal(error: BaseException) -> InvalidRequest:
    if isinstance(error, InvalidRequest):
        return error
    return InvalidRequest(
        f"this worker has no structured outputs: its vocabulary cannot be read "
        f"({type(error).__name__})",
        param="structured",
    )


def _timed_out() -> InvalidRequest:
    return InvalidRequest(
        f"the structured output was not compiled within {COMPILE_TIMEOUT_S:g} s; "
        "send a simpler one",
        param="structured",
    )
