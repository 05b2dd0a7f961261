"""Which tokens a sequence may take next: a structured output's, the allowed ones, no bad words.

    allowed_token_ids ─┐
    bad_words_ids ─────┼─► one bit a token ─► sampler, before top-k, top-p and the draw
    structured ────────┘

A mask is a function of the parameters and the output tokens. Where the last output is still on its
way from a device, its value is given here as soon as it is known. Bad words give way where they
would leave nothing; a grammar that leaves nothing is an error of its sequence.

Not known here: logits, devices. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple
from weakref import WeakKeyDictionary

import llguidance
import numpy as np
from numpy.typing import NDArray

from baton.core.request import SamplingParams
from baton.engine.grammar.token_grammar import TokenGrammar, fill_masks
from baton.engine.sequence import Sequence

Words = NDArray[np.int32]
NO_TOKEN_ALLOWED = "the structured output cannot go on: no token of the model fits"
WORD_BITS = 32


class TokenMask(NamedTuple):
    """Of one sequence's next token."""

    words: Words
    """int32 [ceil(vocab_size / 32)]: bit i of word j allows token 32 * j + i. All of them with an
    error."""
    error: str = ""
    """Why the sequence must end without a further token."""


def depends_on_output(params: SamplingParams) -> bool:
    """Which tokens are possible depends on the tokens before."""
    return params.structured is not None or any(len(word) > 1 for word in params.bad_words_ids)


class TokenMasks:
    """Called once a step, from one thread at a time."""

    def __init__(self, vocab_size: int, *, num_threads: int = 1) -> None:
        """`num_threads` compute the masks of structured outputs."""
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // WORD_BITS)
        self._num_threads = num_threads
        self._executor: llguidance.LLExecutor | None = None
        self._allowed: WeakKeyDictionary[Sequence, Words] = WeakKeyDictionary()
        """Of sequences with allowed_token_ids."""

    def compute(
        self, sequences: Iterable[Sequence], pending: Mapping[Sequence, int] | None = None
    ) -> dict[Sequence, TokenMask]:
        """Masks of those of `sequences` that have limits.

        `pending` has the last token of sequences whose host does not know it yet.
        """
        limited = [s for s in sequences if s.request.sampling.limits_tokens]
        if not limited:
            return {}
        outputs = [_output(s, pending) for s in limited]
        words = np.full((len(limited), self._num_words), -1, dtype=np.int32)
        errors = self._apply_grammars(limited, outputs, words)
        for row, (sequence, output) in enumerate(zip(limited, outputs, strict=True)):
            if output is None or row in errors:
                continue
            if sequence.request.sampling.allowed_token_ids:
                words[row] = self._allowed_words(sequence)
            self._ban(sequence.request.sampling, output, words[row])
        return {
            sequence: TokenMask(words[row], errors.get(row, ""))
            for row, sequence in enumerate(limited)
        }

    def _apply_grammars(
        self,
        sequences: list[Sequence],
        outputs: list[SequenceOf[int] | None],
        words: Words,
    ) -> dict[int, str]:
        """Masks of structured outputs into their rows; returns the rows in error."""
        errors: dict[int, str] = {}
        rows: list[int] = []
        grammars: list[TokenGrammar] = []
        for row, (sequence, output) in enumerate(zip(sequences, outputs, strict=True)):
            if sequence.request.sampling.structured is None or output is None:
                continue
            grammar = sequence.grammar
            assert grammar is not None, "it is compiled before the sequence samples"
            grammar.advance(output)
            if grammar.error:
                errors[row] = grammar.error
            else:
                rows.append(row)
                grammars.append(grammar)
        if not rows:
            return errors
        masks = np.zeros((len(rows), self._num_words), dtype=np.int32)
        if self._executor is None:
            self._executor = llguidance.LLExecutor(self._num_threads)
        fill_masks(self._executor, grammars, masks)
        for row, grammar, mask in zip(rows, grammars, masks, strict=True):
            self._set_ends(sequences[row], mask, is_allowed=grammar.may_end)
            grammar.shorten(mask)
            if grammar.error or not mask.any():
                errors[row] = grammar.error or NO_TOKEN_ALLOWED
            else:
                words[row] = mask
        return errors

    def _set_ends(self, sequence: Sequence, mask: Words, *, is_allowed: bool) -> None:
        """The ends of sequence that the request knows, whichever the library goes by."""
        ends = self._bits(sequence.request.eos_token_ids)
        mask &= ~ends
        if is_allowed:
            mask |= ends

    def _ban(self, params: SamplingParams, output: SequenceOf[int], words: Words) -> None:
        """Clear the last tokens of bad words that the output has begun, unless nothing is left."""
        banned = [
            word[-1]
            for word in params.bad_words_ids
            if tuple(output[len(output) - len(word) + 1 :]) == word[:-1]
        ]
        if banned:
            rest = words & ~self._bits(banned)
            if rest.any():
                words[:] = rest

    def _allowed_words(self, sequence: Sequence) -> Words:
        words = self._allowed.get(sequence)
        if words is None:
            words = self._bits(sequence.request.sampling.allowed_token_ids)
            self._allowed[sequence] = words
        return words

    def _bits(self, token_ids: SequenceOf[int]) -> Words:
        ids = np.array(token_ids, dtype=np.int64)
        ids = ids[(ids >= 0) & (ids < self._vocab_size)]
        words = np.zeros(self._num_words, dtype=np.uint32)
        bits = np.left_shift(np.uint32(1), (ids % WORD_BITS).astype(np.uint32))
        np.bitwise_or.at(words, ids // WORD_BITS, bits)
        return words.view(np.int32)


def _output(sequence: Sequence, pending: Mapping[Sequence, int] | None) -> SequenceOf[int] | None:
    """All output tokens; None when the pending one ends the sequence: its row means nothing."""
    output = sequence.output_token_ids
    if not sequence.num_pending_tokens or not depends_on_output(sequence.request.sampling):
        return output
    assert pending is not None, "the runner tells what is pending"
    token_id = pending[sequence]
    return None if token_id in sequence.stop_ids else [*output, token_id]


class MasksAside:
    """Computes masks on a thread while the engine's own computes logits."""

    def __init__(self, masks: TokenMasks) -> None:
        self._masks = masks
        self._thread: ThreadPoolExecutor | None = None

    def start(self, sequences: Iterable[Sequence]) -> Future[dict[Sequence, TokenMask]]:
        """The sequences may not change before the result is there."""
        limited = [s for s in sequences if s.request.sampling.limits_tokens]
        if limited:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="token-masks")
            return self._thread.submit(self._masks.compute, limited)
        nothing: Future[dict[Sequence, TokenMask]] = Future()
        nothing.set_result({})
        return nothing
