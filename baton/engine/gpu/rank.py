"""One rank's computation of a step on a GPU: slices in, logits out, nothing waited for.

Every rank of a group runs the same slices. Not known here: sampling parameters, scheduling.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.batch import LayerMarks, SequenceSlice
from baton.engine.gpu.device import ComputeDevice
from baton.engine.gpu.graphs import DecodeSteps, EagerDecode, GraphedDecode, Progress
from baton.engine.gpu.inputs import InputStaging
from baton.engine.gpu.layer_watch import LayerWatch
from baton.engine.gpu.model import GpuLlama
from baton.engine.gpu.slots import Assignment, SlotTable


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
    """The model of one rank, its buffers and its captured decode steps."""

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
        self._decode: DecodeSteps = EagerDecode(())

    def prepare_decode(
        self, buckets: Sequence[int], *, is_graphed: bool, on_progress: Progress
    ) -> None:
        """Make decode steps of these batch sizes ready (see `graphs.decode_buckets`), in inference
        mode."""
        # One for all sizes: logits of a graph's own would stay allocated beside all others'.
        self._logits = self._model.logits_buffer(max(buckets, default=0))
        if is_graphed:
            self._decode = GraphedDecode(self._decode_step, buckets, self._device, on_progress)
        else:
            self._decode = EagerDecode(buckets)

    def run(self, slices: Sequence[SequenceSlice], marks: LayerMarks | None = None) -> RankStep:
        """Launch a non-empty step; called inside `ComputeDevice.stream()` and inference mode."""
        assignment = self._slots.assign([s.request_id for s in slices])
        is_decode = all(len(s.token_ids) == 1 and s.samples for s in slices)
        bucket = self._decode.bucket_for(len(slices)) if is_decode else None
        if bucket is not None:
            sampled = self._staging.pack_decode(slices, assignment.slots, bucket)
            logits = self._decode.run(bucket, self._decode_step)
            return RankStep(logits, sampled, assignment)
        packed = self._staging.pack(slices, assignment.slots)
        on_layers = None if marks is None else functools.partial(self._watch.pass_layers, marks)
        chosen = self._model.forward(packed.inputs, self.last_tokens, on_layers=on_layers)
        return RankStep(chosen, packed.sampled, assignment)

    def _decode_step(self, num_rows: int) -> Tensor:
        logits = self._model.forward(
            self._staging.decode_inputs(num_rows), self.last_tokens, self._logits[:num_rows]
        )
        assert logits is not None
        return logits
