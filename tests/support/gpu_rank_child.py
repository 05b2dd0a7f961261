"""A rank of the GPU engine under Triton's interpreter, in the place of a real rank's program."""

from __future__ import annotations

import pytest

from baton.engine import factory
from baton.engine.communicator import Communicator
from baton.engine.config import EngineConfig
from baton.engine.factory import PoolMemoryFactory
from baton.engine.gpu.build import build_gpu_rank
from baton.engine.gpu.device import InterpretedDevice
from baton.engine.tensor_parallel import rank
from baton.engine.tensor_parallel.rank_runner import BuiltRank
from triton_interpreter import complete_interpreter


def build_interpreted_rank(
    config: EngineConfig,
    *,
    communicator: Communicator,
    pool_memory_factory: PoolMemoryFactory | None,
    num_scratch_blocks: int = 0,
) -> BuiltRank:
    """In the place of `factory.build_rank`."""
    return build_gpu_rank(
        config,
        communicator=communicator,
        device=InterpretedDevice(),
        num_scratch_blocks=num_scratch_blocks,
    )


if __name__ == "__main__":
    complete_interpreter(pytest.MonkeyPatch())
    factory.build_rank = build_interpreted_rank
    rank.main()
