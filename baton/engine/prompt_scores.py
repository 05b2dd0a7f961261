"""What the model thinks of prompt tokens: log-probabilities from a chunk's logits, piece by piece.

The row of a token holds the distribution of the token after it. Only the log-probabilities that are
wanted outlive a piece, so memory does not grow with a chunk times the vocabulary. Any device;
`results` is where the host waits for it. Not known here: the model, other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from baton.core.request import TokenLogprobs
from baton.engine.batch import NO_TOKEN_ID, Batch, SampledToken, ScoredSpan

SCORED_ROWS = 64
"""Rows of logits at a time."""


class PromptScores:
    """Of one step, on the rank that samples."""

    def __init__(self, batch: Batch, spans: SequenceOf[ScoredSpan], vocab_size: int) -> None:
        """Reads the sequences now; `spans` in the order of the rows that will come."""
        self._spans = spans
        self._vocab_size = vocab_size
        self._targets: list[int] = []
        self._num_top: list[int] = []
        for span in spans:
            sequence = batch.scheduled[span.slice_index].sequence
            first = sequence.num_computed_tokens + 1
            self._targets += sequence.token_ids[first : first + span.num_rows]
            wanted = sequence.request.sampling.prompt_logprobs or 0
            self._num_top.append(min(wanted, vocab_size))
        self._pieces: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, first_row: int, logits: Tensor) -> None:
        """Logits [num_rows, at least vocab_size] of rows of the spans from `first_row` on."""
        targets = self._targets[first_row : first_row + logits.shape[0]]
        logprobs = torch.log_softmax(logits[:, : self._vocab_size].float(), dim=-1)
        columns = torch.tensor(targets, device=logits.device)[:, None]
        best = logprobs.topk(max(self._num_top), dim=-1)
        self._pieces.append((logprobs.gather(-1, columns)[:, 0], best.indices, best.values))

    def results(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        """By index of the slice."""
        rows: list[tuple[float, list[int], list[float]]] = []
        for values, ids, tops in self._pieces:
            rows += zip(values.tolist(), ids.tolist(), tops.tolist(), strict=True)
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        first = 0
        for span, num_top in zip(self._spans, self._num_top, strict=True):
            end = first + span.num_rows
            found[span.slice_index] = tuple(
                TokenLogprobs(target, value, tuple(zip(ids[:num_top], tops[:num_top], strict=True)))
                for target, (value, ids, tops) in zip(
                    self._targets[first:end], rows[first:end], strict=True
                )
            )
            first = end
        return found


def with_scores(
    results: list[SampledToken | None], scores: PromptScores | None
) -> list[SampledToken | None]:
    """A step's outcomes with the prompt's log-probabilities, in place."""
    if scores is None:
        return results
    for index, entries in scores.results().items():
        sampled = results[index] or SampledToken(NO_TOKEN_ID, None)
        results[index] = sampled._replace(prompt_logprobs=entries)
    return results
