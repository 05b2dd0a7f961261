"""Runs one batch: plan, forward pass, sampling. The engine's only door to tensors.

All calls come from one thread, the engine's. Not known here: scheduling, block life cycle.
"""

from __future__ import annotations

import torch

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.batch import Batch, SampledToken
from baton.engine.config import EngineConfig
from baton.engine.kv_cache import KvPool
from baton.engine.models.llama import LlamaModel
from baton.engine.sampler import Sampler
from baton.engine.step_plan import build_plan
from baton.engine.weights import LoadedModel


class ModelRunner:
    """Implements `batch.Runner` over a loaded model and its KV pool."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        layout: KvLayout,
        num_blocks: int,
        pool_memory: memoryview | None = None,
    ) -> None:
        """`pool_memory` is zeroed and writable and outlives the runner; None allocates it.

        Raises ConfigError when `layout` is not the model's or the memory is too small.
        """
        difference = layout.difference(model.layout(config.block_size))
        if difference:
            raise ConfigError(f"KV layout given and KV layout of the model differ: {difference}")
        with torch.inference_mode():
            self._pool = KvPool(layout, num_blocks, memory=pool_memory, device=model.device)
            self._model = LlamaModel(
                model.model_config,
                model.weights,
                self._pool,
                max_positions=min(model.max_model_len, num_blocks * layout.block_size),
                device=model.device,
            )
        self._sampler = Sampler(model.model_config.vocab_size)

    @property
    def pool_address(self) -> int:
        """Address of the pool's first byte."""
        return self._pool.address

    @property
    def pool_bytes(self) -> int:
        return self._pool.num_bytes

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        """Compute all tokens of the batch and sample where due; see `batch.Runner`."""
        results: list[SampledToken | None] = [None] * len(batch.scheduled)
        if not batch.scheduled:
            return results
        with torch.inference_mode():
            plan = build_plan(batch.scheduled, self._pool)
            logits = self._model.forward(plan)
            if logits is None:
                return results
            sequences = [batch.scheduled[i].sequence for i in plan.sampled]
            for index, token in zip(
                plan.sampled, self._sampler.sample(sequences, logits), strict=True
            ):
                results[index] = token
        return results
