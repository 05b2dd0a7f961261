"""Puts an engine together: model, pool memory, runner, control.

The pool's memory may come from outside, because only shared memory can be offered to a peer that
reads through the file system. Not known here: who drives the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.clock import Clock
from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.host_memory import keep_freed_memory, release_freed_memory
from baton.engine.thread_policy import limit_spinning

PoolMemoryFactory = Callable[[int], memoryview]
"""Bytes wanted -> zeroed, writable memory of at least that size."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what its worker says of it."""

    engine: Engine
    layout: KvLayout
    num_blocks: int
    max_model_len: int
    """Tokens of prompt and output together that one sequence can have here."""
    pool_address: int
    pool_bytes: int


def build_engine(
    config: EngineConfig,
    *,
    clock: Clock,
    pool_memory_factory: PoolMemoryFactory | None = None,
) -> BuiltEngine:
    """Load `config.model_path` and build the engine. Raises ConfigError.

    Sets the thread count and the allocator of the whole process, and imports torch only now.
    """
    limit_spinning()
    import torch

    from baton.engine.model_runner import ModelRunner
    from baton.engine.weights import load_model

    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    keep_freed_memory()
    model = load_model(config)
    release_freed_memory()
    layout = model.layout(config.block_size)
    num_blocks = config.kv_cache_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"kv_cache_bytes {config.kv_cache_bytes} is below one block of {layout.block_bytes} "
            f"bytes ({layout.block_size} tokens); raise it"
        )
    memory = None
    if pool_memory_factory is not None:
        memory = pool_memory_factory(num_blocks * layout.block_bytes)
    runner = ModelRunner(model, config, layout, num_blocks, memory)
    engine = Engine(
        config=config,
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=model.max_model_len,
        runner=runner,
        clock=clock,
        vocab_size=model.model_config.vocab_size,
    )
    return BuiltEngine(
        engine=engine,
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=engine.max_num_tokens,
        pool_address=runner.pool_address,
        pool_bytes=runner.pool_bytes,
    )
