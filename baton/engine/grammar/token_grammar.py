"""The grammar of one sequence: which tokens may follow its output.

The state is a function of the output tokens alone. A sequence that comes from another worker, or
is computed again, starts at the grammar's first token and is fed all its output, so it goes on as
if it had never moved.

Not known here: sampling, other limits on tokens. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import llguidance
import numpy as np
from numpy.typing import NDArray

from baton.engine.grammar.digit_runs import MAX_RUN, DigitRuns
from baton.engine.grammar.spec import one_line


class CompiledGrammar(NamedTuple):
    """At the first token; not to be advanced."""

    matcher: llguidance.LLMatcher
    digits: DigitRuns | None = None
    """Of JSON, whose numbers are to end."""


class TokenGrammar:
    def __init__(self, compiled: CompiledGrammar) -> None:
        """`compiled` stays where it is."""
        self.matcher = compiled.matcher.deep_copy()
        self._digits = compiled.digits
        self._num_digits = 0
        self._num_consumed = 0

    def advance(self, output_token_ids: SequenceOf[int]) -> None:
        """Feed what follows the outputs fed so far; ends of sequence are no outputs."""
        new = list(output_token_ids[self._num_consumed :])
        if new:
            self._num_consumed += len(new)
            self.matcher.consume_tokens(new)
            if self._digits is not None:
                for token_id in new:
                    self._num_digits = self._digits.after(self._num_digits, token_id)

    def shorten(self, words: NDArray[np.int32]) -> None:
        """Take further digits out of a mask after a long run of them, unless nothing is left."""
        if self._digits is None or self._num_digits < MAX_RUN:
            return
        rest = words.copy()
        rest[: len(self._digits.words)] &= ~self._digits.words
        if rest.any():
            words[:] = rest

    @property
    def error(self) -> str:
        """Why the grammar cannot go on, in one line; empty while it can."""
        if not self.matcher.is_error():
            return ""
        return f"the structured output cannot go on: {one_line(self.matcher.get_error())}"

    @property
    def may_end(self) -> bool:
        """The output is complete as it is."""
        return bool(self.matcher.is_accepting())


def fill_masks(
    executor: llguidance.LLExecutor, grammars: SequenceOf[TokenGrammar], words: NDArray[np.int32]
) -> None:
    """What each grammar allows next, in rows of words [>= len(grammars), ceil(vocab_size / 32)].

    Bit i of word j allows token 32 * j + i. Runs outside the interpreter lock.
    """
    num_rows, num_words = words.shape
    executor.unsafe_compute_mask_ptr(
        [(grammar.matcher, row) for row, grammar in enumerate(grammars)],
        words.ctypes.data,
        num_words * words.itemsize,
        num_rows,
    )
