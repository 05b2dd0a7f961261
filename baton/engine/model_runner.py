"""Runs one step on a CPU: plan, forward pass, sampling. The engine's only door to tensors.

One object per rank; the ranks of a group compute the same steps and rank 0 alone samples. All
calls come from one thread. Not known here: scheduling, block life cycle, other processes.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.batch import (
    Batch,
    CompletedStep,
    SampledToken,
    SequenceSlice,
    slices,
)
from baton.engine.communicator import Communicator, SingleCommunicator
from baton.engine.config import EngineConfig
from baton.engine.kv_cache import KvPool
from baton.engine.models.llama import LlamaModel
from baton.engine.parallel import SINGLE, Parallel
from baton.engine.prompt_scores import PromptScores, with_scores
from baton.engine.sampler import Sampler
from baton.engine.step_plan import build_plan
from baton.engine.token_masks import MasksAside, TokenMasks
from baton.engine.weights import LoadedModel


class ModelRunner:
    """Implements `batch.Runner` and `rank_runner.RankRunner` over a loaded model and its KV."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        layout: KvLayout,
        num_blocks: int,
        pool_memory: memoryview | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """`pool_memory` is zeroed and writable and outlives the runner; None allocates it.

        `model` holds the weights of the communicator's rank, the only one when None is given.
        `layout` is the whole model's, for a pool that the ranks share, or the rank's own. Raises
        ConfigError when it is neither or the memory is too small.
        """
        communicator = communicator or SingleCommunicator()
        # Which part of the layout's heads the rank works on: its own pool has no others.
        parallel = Parallel(communicator.rank, communicator.size)
        if layout == model.rank_layout(config.block_size):
            parallel = SINGLE
        elif difference := layout.difference(model.layout(config.block_size)):
            raise ConfigError(f"KV layout given and KV layout of the model differ: {difference}")
        self._block_size = layout.block_size
        with torch.inference_mode():
            self._pool = KvPool(
                layout,
                num_blocks,
                memory=pool_memory,
                device=model.device,
                parallel=parallel,
                scales=model.pool_scales(),
            )
            self._model = LlamaModel(
                model.model_config,
                model.weights,
                self._pool,
                max_positions=min(model.max_model_len, num_blocks * layout.block_size),
                device=model.device,
                communicator=communicator,
            )
        self._vocab_size = model.model_config.vocab_size
        self._sampler = Sampler(self._vocab_size)
        self._masks = MasksAside(TokenMasks(self._vocab_size))

    @property
    def pool_address(self) -> int:
        """Address of the pool's first byte."""
        return self._pool.address

    @property
    def pool_bytes(self) -> int:
        return self._pool.num_bytes

    @property
    def max_in_flight(self) -> int:
        return 1

    def launch(self, batch: Batch) -> CompletedStep:
        """Compute all tokens of the batch and sample where due; see `batch.Runner`."""
        return self.launch_slices(batch, slices(batch, self._block_size))

    def launch_slices(self, batch: Batch, slices: SequenceOf[SequenceSlice]) -> CompletedStep:
        """`launch` on rank 0, with the slices of the batch that the other ranks run."""
        results: list[SampledToken | None] = [None] * len(slices)
        if not slices:
            return CompletedStep(results)
        masks = self._masks.start(s.sequence for s in batch.scheduled if s.samples)
        with torch.inference_mode():
            plan = build_plan(slices, self._pool)
            scores = PromptScores(batch, plan.scored, self._vocab_size) if plan.scored else None
            on_scored = None if scores is None else scores.add
            try:
                logits = self._model.forward(plan, batch.layer_marks, on_scored)
            finally:
                token_masks = masks.result()
            if logits is None:
                return CompletedStep(with_scores(results, scores))
            sequences = [batch.scheduled[i].sequence for i in plan.sampled]
            tokens = self._sampler.sample(sequences, logits, token_masks)
        for index, token in zip(plan.sampled, tokens, strict=True):
            results[index] = token
        return CompletedStep(with_scores(results, scores))

    def run(self, slices: SequenceOf[SequenceSlice]) -> None:
        """This rank's part of a step that rank 0 has launched."""
        with torch.inference_mode():
            self._model.forward(build_plan(slices, self._pool))
