"""Token log-probabilities in the shapes of the two routes.

JSON has no minus infinity, so impossible tokens are reported with LOWEST_LOGPROB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.core.request import TokenLogprobs
from baton.engine.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0


def chat_entries(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprobs], num_top: int
) -> list[dict[str, object]]:
    """One entry per token, in the form of `choices[].logprobs.content`."""
    return [
        {
            **_chat_entry(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_entry(tokenizer, *top) for top in entry.top[:num_top]],
        }
        for entry in logprobs
    ]


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


@dataclass(slots=True)
class CompletionLogprobs:
    """Parallel arrays in the form of the completions route; one instance per choice and chunk."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)


def completion_entries(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprobs], num_top: int, offset: int
) -> tuple[CompletionLogprobs, int]:
    """The arrays for these tokens, whose text starts `offset` characters into the output, and the
    offset of the token after them.
    """
    arrays = CompletionLogprobs()
    for entry in logprobs:
        text = tokenizer.token_text(entry.token_id)
        logprob = max(entry.logprob, LOWEST_LOGPROB)
        arrays.tokens.append(text)
        arrays.token_logprobs.append(logprob)
        top = {
            tokenizer.token_text(token_id): max(value, LOWEST_LOGPROB)
            for token_id, value in entry.top[:num_top]
        }
        # The chosen token is always among them, even when it is not one of the most likely.
        top.setdefault(text, logprob)
        arrays.top_logprobs.append(top)
        arrays.text_offset.append(offset)
        offset += len(text)
    return arrays, offset
