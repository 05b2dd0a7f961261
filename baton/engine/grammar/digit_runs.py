"""Numbers in JSON have no greatest length, and a model may go on with digits for ever.

After MAX_RUN digits in a row no further one is possible, unless the grammar allows nothing else (as
in a pattern that asks for more). Not known here: grammars, sequences. No torch.
"""

from __future__ import annotations

import llguidance
import numpy as np
from numpy.typing import NDArray

MAX_RUN = 20
"""More than a double or a 64-bit integer can tell apart."""
_DIGITS = frozenset(b"0123456789")


class DigitRuns:
    """Of one vocabulary; shared by all its grammars."""

    def __init__(self, tokenizer: llguidance.LLTokenizer) -> None:
        self._tokenizer = tokenizer
        size = tokenizer.vocab_size
        starts = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
        for token_id in range(size):
            data = self._bytes(token_id)
            starts[token_id] = bool(data) and data[0] in _DIGITS
        self.words: NDArray[np.int32] = np.packbits(starts, bitorder="little").view(np.int32)
        """int32 [ceil(vocab_size / 32)]: tokens that start with a digit, as bits."""

    def after(self, run: int, token_id: int) -> int:
        """Digits at the end of a text that had `run` of them, with this token."""
        data = self._bytes(token_id)
        num_digits = 0
        for byte in reversed(data):
            if byte not in _DIGITS:
                return num_digits
            num_digits += 1
        return run + num_digits

    def _bytes(self, token_id: int) -> bytes:
        return bytes(self._tokenizer.decode_bytes([token_id]))
