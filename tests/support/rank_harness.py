"""A whole tensor-parallel group, stepped by hand: rank 0 here, the others in processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from baton.engine.batch import SequenceSlice
from baton.engine.config import EngineConfig
from baton.engine.factory import build_root
from baton.engine.model_runner import ModelRunner
from baton.engine.step_plan import build_plan
from baton.engine.tensor_parallel.group import RankGroup
from model_harness import ModelHarness


class GroupHarness(ModelHarness):
    """A ModelHarness whose `logits` come from `tp_size` ranks. To be closed."""

    def __init__(
        self, folder: Path, *, tp_size: int, dtype: str = "float32", num_blocks: int = 64
    ) -> None:
        super().__init__(folder, dtype=dtype, block_size=4, num_blocks=num_blocks)
        config = EngineConfig(
            model_path=folder,
            dtype=dtype,
            block_size=4,
            tp_size=tp_size,
            kv_cache_bytes=num_blocks * self.layout.block_bytes // tp_size,
            num_threads=1,
        )
        self.group = RankGroup(config)
        try:
            self.group.start()
            rank = build_root(config, self.group, None)
        except BaseException:
            self.group.close()
            raise
        assert isinstance(rank.runner, ModelRunner)
        assert (rank.num_blocks, rank.layout) == (num_blocks, self.layout)
        self._rank_runner = rank.runner
        self.pool = rank.runner._pool

    def forward(self, step: tuple[SequenceSlice, ...]) -> tuple[list[int], Tensor | None]:
        self.group.send_step(step, num_threads=1)
        with torch.inference_mode():
            plan = build_plan(step, self.pool)
            rows = self._rank_runner._model.forward(plan)
        self.group.step_ended()
        return plan.sampled, rows

    def close(self) -> None:
        self.group.close()
