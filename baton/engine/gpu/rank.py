"""One rank's computation of a step on a GPU: slices in, logits out, nothing waited for.

Every rank of a group runs the same slices. Not known here: sampling parameters, scheduling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.batch import LayerMarks, ScoredSpan, SequenceSlice
from baton.engine.gpu.device import ComputeDevice
from baton.engine.gpu.graphs import EagerSteps, GraphedSteps, PaddedSteps, Progress
from baton.engine.gpu.inputs import InputStaging
from baton.engine.gpu.layer_watch import LayerWatch
from baton.engine.gpu.model import GpuLlama
from baton.engine.gpu.slots import Assignment, SlotTable
from baton.engine.models.llama import OnScored


@dataclass(frozen=True, slots=True)
class RankLimits:
    """Sizes that buffers are taken for."""

    max_num_seqs: int
    """Sequences of one step."""
    max_num_tokens: int
    """Tokens of one step."""
    max_num_blocks: int
    """KV blocks of one sequence."""
    block_size: int


@dataclass(frozen=True, slots=True)
class RankStep:
    """A launched forward pass."""

    logits: Tensor | None
    """[num sampled, vocabulary of this rank]; padding rows may follow. None: nothing sampled."""
    sampled: list[int]
    """For each row of logits, the index of its slice."""
    assignment: Assignment


class GpuRank:
    """The model of one rank, its buffers and its captured steps."""

    def __init__(self, model: GpuLlama, device: ComputeDevice, limits: RankLimits) -> None:
        self._model = model
        self._device = device
        self._staging = InputStaging(
            device,
            max_num_seqs=limits.max_num_seqs,
            max_num_tokens=limits.max_num_tokens,
            max_num_blocks=limits.max_num_blocks,
            block_size=limits.block_size,
        )
        self._slots = SlotTable(limits.max_num_seqs)
        self._watch = LayerWatch(device)
        self.last_tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int32, device=device.device)
        """[max_num_seqs] the last sampled token of each place; written by the sampler of rank 0
        and, with several ranks, broadcast."""
        self._logits = model.logits_buffer(0)
        self._decode: PaddedSteps = EagerSteps(())
        self._chunks: PaddedSteps = EagerSteps(())

    def prepare_steps(
        self,
        decode_buckets: Sequence[int],
        chunk_buckets: Sequence[int],
        *,
        is_graphed: bool,
        on_progress: Progress,
    ) -> None:
        """Make decode steps and lone chunks of these sizes ready (see `graphs`), in inference mode,
        before the pool holds anything of value."""
        # One for all sizes: logits of a graph's own would stay allocated beside all others'.
        self._logits = self._model.logits_buffer(max(decode_buckets, default=0))
        if not is_graphed:
            self._chunks = EagerSteps(chunk_buckets)
            self._decode = EagerSteps(decode_buckets)
            return
        pool = torch.cuda.graph_pool_handle()
        num_chunks, total = len(chunk_buckets), len(chunk_buckets) + len(decode_buckets)
        self._staging.reset_chunks()
        self._chunks = GraphedSteps(
            self._chunk_step,
            chunk_buckets,
            self._device,
            pool,
            lambda done, _: on_progress(done, total),
        )
        self._decode = GraphedSteps(
            self._decode_step,
            decode_buckets,
            self._device,
            pool,
            lambda done, _: on_progress(num_chunks + done, total),
        )

    def run(
        self,
        slices: Sequence[SequenceSlice],
        marks: LayerMarks | None = None,
        make_scorer: Callable[[list[ScoredSpan]], OnScored] | None = None,
    ) -> RankStep:
        """Launch a non-empty step; called inside `ComputeDevice.stream()` and inference mode.

        `make_scorer`, on rank 0, is called in steps with scored rows, before the forward pass.
        """
        assignment = self._slots.assign([s.request_id for s in slices])
        is_decode = all(len(s.token_ids) == 1 and s.samples for s in slices)
        bucket = self._decode.bucket_for(len(slices)) if is_decode else None
        if bucket is not None:
            sampled = self._staging.pack_decode(slices, assignment.slots, bucket)
            logits = self._decode.run(bucket, self._decode_step)
            return RankStep(logits, sampled, assignment)
        bucket = self._chunk_bucket(slices) if marks is None else None
        if bucket is not None:
            sampled = self._staging.pack_chunk(slices[0], assignment.slots[0], bucket)
            return RankStep(self._chunks.run(bucket, self._chunk_step), sampled, assignment)
        packed = self._staging.pack(slices, assignment.slots)
        on_layers = None if marks is None else functools.partial(self._watch.pass_layers, marks)
        on_scored = make_scorer(packed.scored) if packed.scored and make_scorer else None
        chosen = self._model.forward(
            packed.inputs, self.last_tokens, on_layers=on_layers, on_scored=on_scored
        )
        return RankStep(chosen, packed.sampled, assignment)

    def _chunk_bucket(self, slices: Sequence[SequenceSlice]) -> int | None:
        """The size to pad to when the step is one chunk that samples."""
        if len(slices) > 1 or not slices[0].samples or slices[0].num_scored:
            return None
        return self._chunks.bucket_for(len(slices[0].token_ids))

    def _chunk_step(self, num_rows: int) -> Tensor:
        logits = self._model.forward(
            self._staging.chunk_inputs(num_rows), self.last_tokens, self._logits[:1]
        )
        assert logits is not None
        return logits

    def _decode_step(self, num_rows: int) -> Tensor:
        logits = self._model.forward(
            self._staging.decode_inputs(num_rows), self.last_tokens, self._logits[:num_rows]
        )
        assert logits is not None
        return logits
