"""A model's tokens as the grammar library wants them: the bytes of each.

The bytes are those that the router shows clients (`token_bytes`), so that what a grammar accepted
is what the client reads. Special tokens and rows of the embedding that stand for no token are
never possible within a grammar. Not known here: grammars, requests. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import llguidance

from baton.core.errors import InvalidRequest
from baton.engine.tokenizer import Tokenizer


class _Vocabulary:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        num_known = min(tokenizer.vocab_size, vocab_size)
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(num_known)]
        self.tokens += [b""] * (vocab_size - num_known)
        self.special_token_ids = [i for i in tokenizer.special_token_ids if i < vocab_size]

    def __call__(self, text: bytes | str) -> Sequence[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="ignore")
        return self._tokenizer.encode(text, add_special_tokens=False)


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> llguidance.LLTokenizer:
    """Takes a second for 150,000 tokens. `vocab_size`: rows of the model's logits.

    Raises InvalidRequest for a model without an end-of-sequence token: no output could end.
    """
    eos_token_ids = [t for t in tokenizer.eos_token_ids if 0 <= t < vocab_size]
    if not eos_token_ids:
        raise InvalidRequest(
            "this model has no end-of-sequence token, so it has no structured outputs",
            param="structured",
        )
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
    return llguidance.LLTokenizer(wrapper, eos_token=eos_token_ids)
