"""From logits to tokens without leaving the GPU, by the numbers that the CPU sampler draws with.

    prepare  host: reads the sequences, one copy of the rows' records to the device
    sample   device: kernels alone, so it can be part of a captured graph
    collect  host, once the step's results have arrived: tokens and log-probabilities

All three run in step order, prepare and sample on one stream. A step launched ahead needs no token
of the step before: the device counts what it samples, and keeps the last token of every slot.

Not known here: the model, the order in which steps are awaited, stop conditions.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from baton.core.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, TokenLogprobs
from baton.engine.batch import SampledToken
from baton.engine.gpu.sampling_state import SlotRecords, SlotUpdate
from baton.engine.sequence import Sequence
from baton.engine.token_masks import TokenMask
from kernels.sampling import sample
from kernels.sampling_counts import count_tokens
from kernels.sampling_rows import (
    BLOCK,
    ROW_DTYPE,
    ROW_WORDS,
    RowFlag,
    SampledRows,
    SamplingPath,
    SamplingState,
    SamplingWorkspace,
)

MAX_EDITS = MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + 256
"""Biased tokens, stop tokens and the model's end-of-sequence tokens of one request."""
_NUM_STAGING_BUFFERS = 3
"""One more than steps in flight, so that waiting for a buffer's copy never takes time."""


class SamplingRow(NamedTuple):
    """One line of the step's logits."""

    sequence: Sequence
    slot: int
    """Kept by the sequence from its first sampled token until `release`."""
    mask: TokenMask | None = None
    """Tokens that are possible; None: all."""


class SamplingStep(NamedTuple):
    """One step's rows as the host needs them once results arrive."""

    num_rows: int
    path: SamplingPath
    num_top: tuple[int | None, ...]
    """Per row the alternatives wanted; None without log-probabilities."""
    errors: dict[int, str]
    """By row, of sequences that must end without the token."""

    def collect(self, sampled: SampledRows) -> list[SampledToken]:
        """One token per row, from results in host memory."""
        token_ids = sampled.token_ids[: self.num_rows].tolist()
        if all(n is None for n in self.num_top):
            return [
                SampledToken(token_id, None, error=self.errors.get(row, ""))
                for row, token_id in enumerate(token_ids)
            ]
        logprobs = sampled.logprobs[: self.num_rows].tolist()
        return [
            SampledToken(
                token_id,
                None
                if num_top is None
                else TokenLogprobs(token_id, logprobs[row], _top(sampled, row, num_top)),
                error=self.errors.get(row, ""),
            )
            for row, (token_id, num_top) in enumerate(zip(token_ids, self.num_top, strict=True))
        ]


def _top(sampled: SampledRows, row: int, num_top: int) -> tuple[tuple[int, float], ...]:
    ids = sampled.top_ids[row, :num_top].tolist()
    return tuple(zip(ids, sampled.top_logprobs[row, :num_top].tolist(), strict=True))


class GpuSampler:
    """Device memory and host records for `max_rows` slots; rows of a step number at most that."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: torch.device,
        *,
        gumbel: bool = False,
        block: int = BLOCK,
    ) -> None:
        self.max_rows = max_rows
        self._device = device
        self._gumbel = gumbel
        self._slots = SlotRecords(vocab_size, max_rows, MAX_EDITS, gumbel=gumbel)
        self._state = SamplingState.allocate(vocab_size, max_rows, max_rows, MAX_EDITS, device)
        self._workspace = SamplingWorkspace.allocate(vocab_size, max_rows, device, block)
        self._sampled = SampledRows.allocate(max_rows, device)
        self._staging = [_Staging(max_rows, device) for _ in range(_NUM_STAGING_BUFFERS)]
        self._next_staging = 0

    def prepare(self, rows: SequenceOf[SamplingRow], num_padded_rows: int = 0) -> SamplingStep:
        """Copy the rows' parameters to the device; the sequences may change afterwards.

        `num_padded_rows` is the batch size of the captured graph, if larger than len(rows).
        """
        num_rows = len(rows)
        for row in rows:
            update = self._slots.admit(row.sequence, row.slot)
            if update is not None:
                self._apply(update)
        staging = self._staging[self._next_staging]
        self._next_staging = (self._next_staging + 1) % len(self._staging)
        staging.wait()
        records = staging.records[:num_rows]
        slots = np.array([row.slot for row in rows], dtype=np.int64)
        num_outputs = np.array([row.sequence.num_output_tokens for row in rows], dtype=np.int64)
        self._slots.fill(records, slots, num_outputs)
        self._allow(rows, records)
        end = max(num_rows, num_padded_rows)
        staging.records[num_rows:end]["slot"] = -1
        staging.records[num_rows:end]["flags"] = 0
        staging.copy_to(self._state.rows, end)
        flags = int(np.bitwise_or.reduce(records["flags"], initial=0))
        num_top: tuple[int | None, ...] = (None,) * num_rows
        if flags & RowFlag.LOGPROBS:
            wants = (records["flags"] & RowFlag.LOGPROBS).tolist()
            num_top = tuple(
                n if w else None for n, w in zip(records["num_top"].tolist(), wants, strict=True)
            )
        path = SamplingPath.of(flags, int(records["num_top"].max(initial=0)))
        errors = {i: row.mask.error for i, row in enumerate(rows) if row.mask and row.mask.error}
        return SamplingStep(num_rows, path, num_top, errors)

    def sample(
        self,
        path: SamplingPath,
        logits: Tensor,
        last_tokens: Tensor,
        *,
        launch_pdl: bool = False,
    ) -> SampledRows:
        """Tokens for logits [num_rows, vocab_size], in the order of the prepared rows.

        Also written to `last_tokens` [max_rows] at the rows' slots. The result's tensors are the
        sampler's own and hold until the next call; rows that pad have token 0.
        """
        sample(
            logits,
            state=self._state,
            workspace=self._workspace,
            path=path,
            last_tokens=last_tokens,
            out=self._sampled,
            launch_pdl=launch_pdl,
        )
        return self._sampled

    def warm_up(self, logits: Tensor, last_tokens: Tensor, *, launch_pdl: bool = False) -> None:
        """Compile every kernel, by steps whose rows all pad; before the first sequence comes.

        `logits` are as in later calls of `sample`; only their shape, strides and dtype matter.
        """
        self.prepare((), logits.shape[0])
        everything = SamplingPath(is_full=True, draws=True, filters=True, top_logprobs=True)
        paths = {
            SamplingPath(is_full=False),
            everything,
            everything._replace(gumbel=self._gumbel),
        }
        for path in paths:
            self.sample(path, logits, last_tokens, launch_pdl=launch_pdl)
        # A slot is counted anew when a sequence enters it.
        self._apply(SlotUpdate(0, None, np.zeros(1, dtype=np.int32), num_prompt_tokens=1))

    def release(self, slot: int) -> None:
        """The slot's sequence is over, or leaves the batch for a while."""
        self._slots.release(slot)

    def _apply(self, update: SlotUpdate) -> None:
        state, slot = self._state, update.slot
        if update.edits is not None:
            for target, values in (
                (state.edit_tokens, update.edits.tokens),
                (state.edit_biases, update.edits.biases),
            ):
                target[slot, : len(values)].copy_(self._pinned(values), non_blocking=True)
        if update.token_ids is not None:
            count_tokens(
                self._pinned(update.token_ids).to(self._device, non_blocking=True),
                slot=slot,
                num_prompt_tokens=update.num_prompt_tokens,
                token_counts=state.token_counts,
            )

    def _allow(self, rows: SequenceOf[SamplingRow], records: np.ndarray) -> None:
        """Masks of all rows in one copy; words of rows without one are not looked at."""
        masked = [i for i, row in enumerate(rows) if row.mask is not None]
        if not masked:
            return
        words = np.zeros((len(rows), self._state.allowed_tokens.shape[1]), dtype=np.int32)
        for i in masked:
            mask = rows[i].mask
            assert mask is not None
            words[i] = mask.words
            records[i]["flags"] |= int(RowFlag.GRAMMAR | RowFlag.ADJUSTS)
        self._state.allowed_tokens[: len(rows)].copy_(self._pinned(words), non_blocking=True)

    def _pinned(self, values: np.ndarray) -> Tensor:
        """Page-locked memory that torch reuses only after the copies from it are done."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


class _Staging:
    """Host memory of one step's records, with the event that ends its copy."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._words = torch.zeros((max_rows, ROW_WORDS), dtype=torch.int32, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None
        self.records: np.ndarray = self._words.numpy().view(ROW_DTYPE)[:, 0]

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, rows: Tensor, num_rows: int) -> None:
        rows[:num_rows].copy_(self._words[:num_rows], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
