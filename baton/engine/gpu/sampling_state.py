"""The host's half of sampling on a GPU: what each slot's sequence asks for, row by row.

A slot keeps the record of its sequence's parameters; a step takes the records of its rows and fills
in what changes, the random number and whether stop tokens are still masked. Penalties need the
tokens themselves, which the host may not know yet, so the device counts them; the host only tracks
how many it has counted, and hands the whole sequence over when that is not what the sequence has.

Not known here: the device's memory, kernels, the order of rows.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import torch

from baton.engine.sampler import request_seed
from baton.engine.sequence import Sequence
from kernels.sampling_rows import ROW_DTYPE, STOP_BIT, RowFlag

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_WORD = (1 << 64) - 1


class SlotEdits(NamedTuple):
    """Tokens with a bias or a stop mask, each once."""

    tokens: np.ndarray
    """int32 [num_edits]: ids, with STOP_BIT"""
    biases: np.ndarray
    """float32 [num_edits]"""


class SlotUpdate(NamedTuple):
    """What must reach the device before the slot samples."""

    slot: int
    edits: SlotEdits | None
    token_ids: np.ndarray | None
    """int32: prompt and output, to be counted anew; None when the counts are right."""
    num_prompt_tokens: int


def random_words(seed_words: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64: `uniform(seed, position)` of the CPU sampler as a fraction of 2^64, per row.

    `seed_words` are `mixed_seed`s. The lowest 11 bits are zero, as its numbers have 53 bits.
    """
    words = seed_words + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA
    return _mix(words) & ~np.uint64(0x7FF)


def mixed_seed(seed: int) -> np.uint64:
    return np.uint64(_mix(np.array([seed & _WORD], dtype=np.uint64))[0])


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIERS[0]
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIERS[1]
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


class SlotRecords:
    """Records of all slots, and whose they are."""

    def __init__(self, vocab_size: int, num_slots: int, max_edits: int, *, gumbel: bool) -> None:
        self._vocab_size = vocab_size
        self._max_edits = max_edits
        self._gumbel = gumbel
        self._owners: list[weakref.ref[Sequence] | None] = [None] * num_slots
        self._num_counted = [0] * num_slots
        self._records = np.zeros(num_slots, dtype=ROW_DTYPE)
        self._seed_words = np.zeros(num_slots, dtype=np.uint64)
        self._min_tokens = np.zeros(num_slots, dtype=np.int64)

    def admit(self, sequence: Sequence, slot: int) -> SlotUpdate | None:
        """Make the slot's record `sequence`'s; the sequence samples one token in this step."""
        owner = self._owners[slot]
        is_new = owner is None or owner() is not sequence
        if is_new:
            self._owners[slot] = weakref.ref(sequence)
            edits = self._describe(sequence, slot)
            self._num_counted[slot] = 0
        if not sequence.request.sampling.has_penalties:
            return SlotUpdate(slot, edits, None, 0) if is_new and len(edits.tokens) else None
        token_ids = None
        if self._num_counted[slot] != sequence.num_tokens:
            assert not sequence.num_pending_tokens, "the device counts what it samples"
            token_ids = np.array(sequence.token_ids, dtype=np.int32)
        self._num_counted[slot] = sequence.num_tokens + 1
        if token_ids is None and not is_new:
            return None
        return SlotUpdate(slot, edits if is_new else None, token_ids, sequence.num_prompt_tokens)

    def release(self, slot: int) -> None:
        self._owners[slot] = None

    def fill(self, rows: np.ndarray, slots: np.ndarray, num_outputs: np.ndarray) -> None:
        """Records of a step into `rows`; num_outputs are the sequences' output positions."""
        rows[:] = self._records[slots]
        rows["random"] = random_words(self._seed_words[slots], num_outputs)
        masks_stops = num_outputs < self._min_tokens[slots]
        rows["flags"] |= np.where(masks_stops, int(RowFlag.MASKS_STOPS | RowFlag.ADJUSTS), 0)

    def _describe(self, sequence: Sequence, slot: int) -> SlotEdits:
        params = sequence.request.sampling
        edits = self._edits(sequence)
        flags = RowFlag(0)
        if params.logit_bias or params.has_penalties:
            flags |= RowFlag.ADJUSTS
        if params.has_penalties:
            flags |= RowFlag.COUNTS
        if params.logprobs is not None:
            flags |= RowFlag.LOGPROBS
        uses_top_k = 0 < params.top_k < self._vocab_size
        if not params.is_greedy:
            is_filtered = uses_top_k or params.top_p < 1.0
            if self._gumbel and not is_filtered and not params.min_p:
                flags |= RowFlag.GUMBEL
            else:
                flags |= RowFlag.DRAWS | (RowFlag.FILTERS if is_filtered else RowFlag(0))
        record = self._records[slot : slot + 1]
        record["slot"] = slot
        record["flags"] = int(flags)
        record["temperature"] = params.temperature
        # By torch, as the CPU sampler does, so that both cut at the same float32.
        record["min_p_distance"] = float(0.0 - torch.tensor(float(params.min_p)).log_())
        record["top_k"] = params.top_k if uses_top_k else 0
        record["repetition_penalty"] = params.repetition_penalty
        record["frequency_penalty"] = params.frequency_penalty
        record["presence_penalty"] = params.presence_penalty
        record["top_p"] = params.top_p
        record["num_edits"] = len(edits.tokens)
        record["num_top"] = min(params.logprobs or 0, self._vocab_size)
        self._seed_words[slot] = mixed_seed(request_seed(sequence))
        self._min_tokens[slot] = params.min_tokens
        return edits

    def _edits(self, sequence: Sequence) -> SlotEdits:
        """Repeated biases of a token add up. Ids outside the vocabulary have no effect."""
        params = sequence.request.sampling
        biases: dict[int, float] = {}
        for token_id, bias in params.logit_bias:
            biases[token_id] = biases.get(token_id, 0.0) + bias
        stops = sequence.stop_ids if params.min_tokens else frozenset()
        token_ids = [t for t in {*biases, *stops} if 0 <= t < self._vocab_size]
        if len(token_ids) > self._max_edits:
            raise ValueError(
                f"{len(token_ids)} biased and stop tokens; the sampler has room for "
                f"{self._max_edits} a sequence: raise max_edits"
            )
        tagged = [t | STOP_BIT if t in stops else t for t in token_ids]
        return SlotEdits(
            np.array(tagged, dtype=np.int32),
            np.array([biases.get(t, 0.0) for t in token_ids], dtype=np.float32),
        )
