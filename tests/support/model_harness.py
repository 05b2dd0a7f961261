"""Sequences with blocks, stepped through a model by hand: no scheduler, no block pool."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.core.block import BlockId
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.batch import Batch, SampledToken, ScheduledSequence, SequenceSlice, slices
from baton.engine.config import EngineConfig
from baton.engine.kv_cache import KvPool
from baton.engine.model_runner import ModelRunner
from baton.engine.models.llama import LlamaModel
from baton.engine.sequence import Sequence
from baton.engine.step_plan import build_plan
from baton.engine.weights import load_model


class ModelHarness:
    """One model and a pool; blocks are handed out scattered, so that order never helps."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        block_size: int = 16,
        num_blocks: int = 64,
    ) -> None:
        self.config = EngineConfig(model_path=folder, dtype=dtype, block_size=block_size)
        self.loaded = load_model(self.config)
        self.layout = self.loaded.layout(block_size)
        self.runner = ModelRunner(self.loaded, self.config, self.layout, num_blocks)
        self.device = torch.device("cpu")
        self.pool = KvPool(
            self.layout, num_blocks, device=self.device, scales=self.loaded.pool_scales()
        )
        self.model = LlamaModel(
            self.loaded.model_config,
            self.loaded.weights,
            self.pool,
            max_positions=self.loaded.max_model_len,
            device=self.device,
        )
        stride = next(n for n in (7, 11, 13, 17) if num_blocks % n)
        self._free = [BlockId(i * stride % num_blocks) for i in range(num_blocks)]
        self._all = list(self._free)
        self._num_sequences = 0

    def sequence(self, token_ids: SequenceOf[int], *, room: int = 64, **sampling: Any) -> Sequence:
        """A sequence with blocks for its tokens and `room` more. Greedy unless told."""
        self._num_sequences += 1
        params = SamplingParams(**({"max_tokens": room, "temperature": 0.0} | sampling))
        request = GenerateRequest(
            RequestId(f"r{self._num_sequences}"), Work.GENERATE, tuple(token_ids), params
        )
        sequence = Sequence(request)
        for _ in range(self.layout.num_blocks_for(len(token_ids) + room)):
            sequence.block_table.append(self._free.pop())
        return sequence

    def reset(self) -> None:
        """Take all blocks back; their stale contents stay."""
        self._free = list(self._all)

    def logits(self, *scheduled: tuple[Sequence, int]) -> list[Tensor | None]:
        """Run one step; the logits of each sequence that samples, float32 [vocab_size]."""
        batch = Batch(tuple(ScheduledSequence(s, n) for s, n in scheduled))
        sampled, rows = self.forward(slices(batch, self.layout.block_size))
        results: list[Tensor | None] = [None] * len(scheduled)
        for position, index in enumerate(sampled):
            assert rows is not None
            results[index] = rows[position].float()
        for sequence, num_new_tokens in scheduled:
            sequence.num_computed_tokens += num_new_tokens
        return results

    def forward(self, step: tuple[SequenceSlice, ...]) -> tuple[list[int], Tensor | None]:
        """For each row of logits the index of its slice, and the logits."""
        with torch.inference_mode():
            plan = build_plan(step, self.pool)
            return plan.sampled, self.model.forward(plan)

    def step(self, *scheduled: tuple[Sequence, int]) -> list[SampledToken | None]:
        """Run one step through the runner and append what was sampled."""
        batch = Batch(tuple(ScheduledSequence(s, n) for s, n in scheduled))
        results = self.runner.launch(batch).wait()
        for (sequence, num_new_tokens), result in zip(scheduled, results, strict=True):
            sequence.num_computed_tokens += num_new_tokens
            if result is not None:
                sequence.token_ids.append(result.token_id)
        return results
