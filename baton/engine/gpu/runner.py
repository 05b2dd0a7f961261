"""Steps on a GPU, launched ahead of their results. One object per rank; rank 0 alone samples.

launch:  slices ─► forward ─► sample ─► copy tokens to the host ─► event      waits for nothing
wait:    event ─► tokens

While the device computes one step the next is packed and launched behind it: the token that a
sequence was given in the step before is read on the device, from `GpuRank.last_tokens`. All calls
come from one thread. Not known here: scheduling, block life cycle, other processes.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from baton.engine.batch import Batch, SampledToken, ScoredSpan, SequenceSlice, slices
from baton.engine.communicator import Communicator
from baton.engine.gpu.device import ComputeDevice, Event
from baton.engine.gpu.rank import GpuRank, RankStep
from baton.engine.gpu.sampler import GpuSampler, SamplingRow, SamplingStep
from baton.engine.models.llama import OnScored
from baton.engine.prompt_scores import PromptScores, with_scores
from baton.engine.sequence import Sequence
from baton.engine.token_masks import TokenMasks, depends_on_output
from kernels.sampling_rows import SampledRows

MAX_IN_FLIGHT = 2
MASK_THREADS = 4
"""Of structured outputs; a step's masks are there before its logits."""
NUM_RESULT_BUFFERS = MAX_IN_FLIGHT
"""The results of a step are read before the step after the next is launched."""


class GpuRunner:
    """Implements `batch.Runner` and `rank_runner.RankRunner`."""

    def __init__(
        self,
        rank: GpuRank,
        sampler: GpuSampler | None,
        device: ComputeDevice,
        communicator: Communicator,
        *,
        vocab_size: int,
        block_size: int,
    ) -> None:
        """`sampler`: of rank 0; None on the others."""
        self._rank = rank
        self._sampler = sampler
        self._device = device
        self._communicator = communicator
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._turn = 0
        self._masks = TokenMasks(vocab_size, num_threads=MASK_THREADS)
        self._last_step: LaunchedGpuStep | None = None
        self._results = (
            []
            if sampler is None
            else [_host_results(device, sampler.max_rows) for _ in range(NUM_RESULT_BUFFERS)]
        )

    @property
    def max_in_flight(self) -> int:
        return MAX_IN_FLIGHT

    def launch(self, batch: Batch) -> LaunchedGpuStep:
        """See `batch.Runner`."""
        return self.launch_slices(batch, slices(batch, self._block_size))

    def launch_slices(self, batch: Batch, slices: SequenceOf[SequenceSlice]) -> LaunchedGpuStep:
        """`launch` on rank 0, with the slices of the batch that the other ranks run."""
        with self._device.stream(), torch.inference_mode():
            scores: PromptScores | None = None

            def make_scorer(spans: list[ScoredSpan]) -> OnScored:
                nonlocal scores
                scores = PromptScores(batch, spans, self._vocab_size)
                return scores.add

            step = self._rank.run(slices, batch.layer_marks, make_scorer)
            logits = self._gather(step)
            sampling = None
            if logits is not None:
                sampling = self._sample(batch, step, logits)
                self._share_tokens(step)
            launched = LaunchedGpuStep(batch, step.sampled, sampling, scores, self._device.record())
        self._last_step = launched
        return launched

    def run(self, slices: SequenceOf[SequenceSlice]) -> None:
        """This rank's part of a step that rank 0 has launched."""
        with self._device.stream(), torch.inference_mode():
            step = self._rank.run(slices)
            self._gather(step)
            self._share_tokens(step)

    def _gather(self, step: RankStep) -> Tensor | None:
        """Logits over the whole vocabulary on rank 0."""
        if step.logits is None:
            return None
        logits = self._communicator.gather_columns(step.logits)
        return None if logits is None else logits[:, : self._vocab_size]

    def _share_tokens(self, step: RankStep) -> None:
        """What rank 0 sampled, to all ranks, for rows of the next step that wait for it."""
        if step.logits is not None:
            self._communicator.broadcast_(self._rank.last_tokens)

    def _sample(self, batch: Batch, step: RankStep, logits: Tensor) -> _Sampling:
        assert self._sampler is not None
        # While the device computes this step's logits. Where a mask depends on a token of the step
        # before, the host waits for that one step, as it would a moment later.
        masks = self._masks.compute(
            (batch.scheduled[i].sequence for i in step.sampled), self._pending_tokens(batch)
        )
        rows = [
            SamplingRow(sequence, step.assignment.slots[i], masks.get(sequence))
            for i, (sequence, _) in ((i, batch.scheduled[i]) for i in step.sampled)
        ]
        prepared = self._sampler.prepare(rows)
        # A captured step computes padding rows as well; they are not sampled.
        logits = logits[: len(rows)]
        sampled = self._sampler.sample(prepared.path, logits, self._rank.last_tokens)
        self._turn = (self._turn + 1) % NUM_RESULT_BUFFERS
        results = self._results[self._turn]
        _copy_results(sampled, results, prepared)
        return _Sampling(prepared, results)

    def _pending_tokens(self, batch: Batch) -> dict[Sequence, int]:
        """Of sequences that need to know, what the step before has sampled."""
        waiting = [
            sequence
            for sequence, _ in batch.scheduled
            if sequence.num_pending_tokens and depends_on_output(sequence.request.sampling)
        ]
        if not waiting:
            return {}
        assert self._last_step is not None, "a pending token has been sampled by some step"
        sampled = self._last_step.token_ids()
        return {sequence: sampled[sequence] for sequence in waiting}


class _Sampling:
    """What a step samples, and where its results arrive."""

    __slots__ = ("_results", "_step")

    def __init__(self, step: SamplingStep, results: SampledRows) -> None:
        self._step = step
        self._results = results

    def collect(self) -> list[SampledToken]:
        return self._step.collect(self._results)


class LaunchedGpuStep:
    """Implements `batch.LaunchedStep`."""

    __slots__ = ("_batch", "_event", "_results", "_sampled", "_sampling", "_scores")

    def __init__(
        self,
        batch: Batch,
        sampled: list[int],
        sampling: _Sampling | None,
        scores: PromptScores | None,
        event: Event,
    ) -> None:
        self._batch = batch
        self._sampled = sampled
        self._sampling = sampling
        self._scores = scores
        self._event = event
        self._results: list[SampledToken | None] | None = None

    def wait(self) -> list[SampledToken | None]:
        """Also waits for steps that only write KV: their blocks may be read from outside then."""
        if self._results is None:
            self._event.wait()
            results: list[SampledToken | None] = [None] * len(self._batch.scheduled)
            if self._sampling is not None:
                for index, token in zip(self._sampled, self._sampling.collect(), strict=True):
                    results[index] = token
            self._results = with_scores(results, self._scores)
        return self._results

    def token_ids(self) -> dict[Sequence, int]:
        """What it sampled, as soon as it is known; before the second launch from here."""
        return {
            scheduled.sequence: result.token_id
            for scheduled, result in zip(self._batch.scheduled, self.wait(), strict=True)
            if result is not None
        }


def _host_results(device: ComputeDevice, max_rows: int) -> SampledRows:
    model = SampledRows.allocate(max_rows, "cpu")
    tensors = (model.token_ids, model.logprobs, model.top_ids, model.top_logprobs)
    return SampledRows(*(device.host_buffer(tuple(t.shape), t.dtype) for t in tensors))


def _copy_results(source: SampledRows, target: SampledRows, step: SamplingStep) -> None:
    """Device to host, as much as the step has."""
    pairs = [(source.token_ids, target.token_ids)]
    if any(n is not None for n in step.num_top):
        pairs.append((source.logprobs, target.logprobs))
    if any(step.num_top):
        pairs.append((source.top_ids, target.top_ids))
        pairs.append((source.top_logprobs, target.top_logprobs))
    for device_rows, host_rows in pairs:
        host_rows[: step.num_rows].copy_(device_rows[: step.num_rows], non_blocking=True)
