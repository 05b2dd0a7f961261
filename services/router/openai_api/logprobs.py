"""Token log-probabilities in the shapes that clients know.

JSON has no minus infinity, so impossible tokens are reported with LOWEST_LOGPROB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton.core.request import TokenLogprobs
from baton.engine.tokenizer import Tokenizer
from services.router.requests.detokenize import Detokenizer

LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are spelled in an answer."""

    tokenizer: Tokenizer
    as_ids: bool = False
    """As `token_id:5` instead of their text, which several tokens may share."""

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


def chat_entries(
    names: TokenNames, logprobs: Iterable[TokenLogprobs], num_top: int
) -> list[dict[str, object]]:
    """One entry per token, in the form of `choices[].logprobs.content`."""
    return [
        {
            **_chat_entry(names, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_entry(names, *top) for top in entry.top[:num_top]],
        }
        for entry in logprobs
    ]


def _chat_entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": names(token_id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(names.tokenizer.token_bytes(token_id)),
    }


@dataclass(slots=True)
class CompletionLogprobs:
    """Parallel arrays in the form of the completions route; one instance per choice and chunk."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def extend(self, more: CompletionLogprobs) -> None:
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


class CompletionArrays:
    """The arrays of one choice, chunk by chunk. An offset is where in the text the character begins
    that the token is of."""

    def __init__(self, names: TokenNames, num_top: int, detokenizer: Detokenizer) -> None:
        """`detokenizer`: of the text that the offsets are in."""
        self._names = names
        self._num_top = num_top
        self._detokenizer = detokenizer
        self._offset = 0

    def of_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> CompletionLogprobs:
        """Of an echoed prompt: nothing comes before its first token, so that has no probability."""
        arrays = CompletionLogprobs()
        first = token_ids[: len(token_ids) - len(logprobs)]
        for token_id in first:
            self._place(arrays, token_id)
            arrays.token_logprobs.append(None)
            arrays.top_logprobs.append(None)
        arrays.extend(self.of_output(logprobs))
        return arrays

    def of_output(self, logprobs: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        arrays = CompletionLogprobs()
        for entry in logprobs:
            text = self._place(arrays, entry.token_id)
            logprob = max(entry.logprob, LOWEST_LOGPROB)
            arrays.token_logprobs.append(logprob)
            top = {
                self._names(token_id): max(value, LOWEST_LOGPROB)
                for token_id, value in entry.top[: self._num_top]
            }
            # The chosen token is always among them, even when it is not one of the most likely.
            top.setdefault(text, logprob)
            arrays.top_logprobs.append(top)
        return arrays

    def _place(self, arrays: CompletionLogprobs, token_id: int) -> str:
        text = self._names(token_id)
        arrays.tokens.append(text)
        arrays.text_offset.append(self._offset)
        self._offset += len(self._detokenizer.push((token_id,)))
        return text


def prompt_entries(
    names: TokenNames, logprobs: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, object] | None]:
    """One entry per prompt token, none for the first, in the form of vLLM's `prompt_logprobs`:
    token id to its log-probability, rank and text. A rank is known of the most likely ones."""
    entries: list[dict[str, object] | None] = [None]
    for entry in logprobs:
        ranks = {
            token_id: (rank, value) for rank, (token_id, value) in enumerate(entry.top, start=1)
        }
        shown = {i: ranks[i] for i, _ in entry.top[:num_top]}
        rank, _ = ranks.get(entry.token_id, (None, 0.0))
        chosen = {entry.token_id: (rank, entry.logprob)}
        entries.append(
            {
                str(token_id): {
                    "logprob": max(value, LOWEST_LOGPROB),
                    "rank": place,
                    "decoded_token": names(token_id),
                }
                for token_id, (place, value) in {**chosen, **shown}.items()
            }
        )
    return entries
