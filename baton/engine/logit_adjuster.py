"""Per-request changes to logits: masked stop tokens, bias, penalties.

What a request needs is kept between consecutive steps and grows by one token a step; a sequence
that skips a step is simply counted again. All rows of a step are changed by one gather and one
scatter per kind of change.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from baton.engine.sequence import Sequence

_FIRST_CAPACITY = 256
_LOWEST = torch.finfo(torch.float32).min
_HIGHEST = torch.finfo(torch.float32).max


def is_adjusted(sequence: Sequence) -> bool:
    """True when the next token is not chosen from the model's logits as they are."""
    params = sequence.request.sampling
    return (
        params.has_penalties
        or bool(params.logit_bias)
        or sequence.num_output_tokens < params.min_tokens
    )


class TokenCounts:
    """Distinct tokens of one sequence, with how often each was output."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slot_of: dict[int, int] = {}
        self._ids = np.empty(_FIRST_CAPACITY, dtype=np.int64)
        self._output_counts = np.zeros(_FIRST_CAPACITY, dtype=np.float32)
        self.num_tokens = 0

    @property
    def ids(self) -> np.ndarray:
        """int64 [number of distinct tokens]"""
        return self._ids[: len(self._slot_of)]

    @property
    def output_counts(self) -> np.ndarray:
        """float32, parallel to `ids`; 0 for tokens of the prompt alone."""
        return self._output_counts[: len(self._slot_of)]

    def extend(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Count what `token_ids`, the whole sequence, holds beyond what was counted before."""
        for index in range(self.num_tokens, len(token_ids)):
            token_id = token_ids[index]
            if not 0 <= token_id < self._vocab_size:
                continue
            slot = self._slot_of.setdefault(token_id, len(self._slot_of))
            if slot == len(self._ids):
                self._grow()
            self._ids[slot] = token_id
            self._output_counts[slot] += index >= num_prompt_tokens
        self.num_tokens = len(token_ids)

    def _grow(self) -> None:
        size = len(self._ids)
        self._ids = np.concatenate((self._ids, np.empty(size, dtype=np.int64)))
        zeros = np.zeros(size, dtype=np.float32)
        self._output_counts = np.concatenate((self._output_counts, zeros))


class LogitAdjuster:
    """Holds the token counts of the sequences that had penalties in the last step."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    def adjust_(self, sequences: SequenceOf[Sequence], logits: Tensor) -> Tensor:
        """Change logits, float32 [len(sequences), vocab_size], in place and return them.

        Order: stop tokens before min_tokens to the lowest number, bias, repetition penalty, then
        frequency and presence penalty. Ids outside the vocabulary have no effect. Finite logits
        stay finite.
        """
        self._mask_stops(sequences, logits)
        self._add_bias(sequences, logits)
        self._penalise(sequences, logits)
        return logits

    def _mask_stops(self, sequences: SequenceOf[Sequence], logits: Tensor) -> None:
        rows: list[int] = []
        columns: list[int] = []
        for row, sequence in enumerate(sequences):
            params = sequence.request.sampling
            if sequence.num_output_tokens >= params.min_tokens:
                continue
            eos = () if params.ignore_eos else sequence.request.eos_token_ids
            stops = [t for t in (*eos, *params.stop_token_ids) if 0 <= t < self._vocab_size]
            rows += [row] * len(stops)
            columns += stops
        if rows:
            logits[rows, columns] = _LOWEST

    def _add_bias(self, sequences: SequenceOf[Sequence], logits: Tensor) -> None:
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for row, sequence in enumerate(sequences):
            for token_id, bias in sequence.request.sampling.logit_bias:
                if 0 <= token_id < self._vocab_size:
                    rows.append(row)
                    columns.append(token_id)
                    values.append(bias)
        if rows:
            where = (torch.tensor(rows), torch.tensor(columns))
            logits.index_put_(where, torch.tensor(values), accumulate=True)

    def _penalise(self, sequences: SequenceOf[Sequence], logits: Tensor) -> None:
        live: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()
        rows, columns, counts, strengths = [], [], [], []
        for row, sequence in enumerate(sequences):
            params = sequence.request.sampling
            if not params.has_penalties:
                continue
            seen = self._seen(sequence)
            live[sequence] = seen
            size = len(seen.ids)
            rows.append(np.full(size, row, dtype=np.int64))
            columns.append(seen.ids)
            counts.append(seen.output_counts)
            penalties = (
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
            strengths.append(np.tile(np.array(penalties, dtype=np.float32), (size, 1)))
        self._counts = live
        if not rows:
            return
        where = (torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns)))
        repetition, frequency, presence = torch.from_numpy(np.concatenate(strengths)).unbind(1)
        output_counts = torch.from_numpy(np.concatenate(counts))
        values = logits[where]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= frequency * output_counts + presence * (output_counts > 0)
        logits[where] = values.clamp_(_LOWEST, _HIGHEST)

    def _seen(self, sequence: Sequence) -> TokenCounts:
        """Counts up to the present; from the last step's when they belong to this sequence."""
        seen = self._counts.get(sequence)
        if seen is None or seen.num_tokens > sequence.num_tokens:
            seen = TokenCounts(self._vocab_size)
        seen.extend(sequence.token_ids, sequence.num_prompt_tokens)
        return seen
