"""Puts an engine together: model, pool memory, runner, control; with several ranks, all of them.

    build_engine, rank 0        group ─► connect ─► build_rank ─► all ready ─► Engine
    tensor_parallel.rank, 1...           connect ─► build_rank ─► ready

The pool's memory may come from outside, because only shared memory can be offered to a peer that
reads through the file system. Scratch blocks lie behind the engine's own: the engine never names
them, so whoever times a link may read and write there.

Not known here: who drives the engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.core.clock import Clock
from baton.core.errors import BatonError, ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.batch import Runner
from baton.engine.config import DEFAULT_CPU_KV_CACHE_BYTES, Device, EngineConfig
from baton.engine.engine import Engine
from baton.engine.grammar.compiler import GrammarCompiler
from baton.engine.grammar.vocabulary import grammar_tokenizer
from baton.engine.host_memory import (
    PoolMemory,
    keep_freed_memory,
    map_shared_pool,
    release_freed_memory,
)
from baton.engine.model_config import load_model_config
from baton.engine.parallel import SINGLE, Parallel
from baton.engine.tensor_parallel.environment import turn_multicast_off
from baton.engine.tensor_parallel.group import RankGroup
from baton.engine.tensor_parallel.limits import check_tp_size
from baton.engine.tensor_parallel.rank_runner import BuiltRank
from baton.engine.tensor_parallel.rank_service import RankKv, RankServiceSpec
from baton.engine.tensor_parallel.rendezvous import Rendezvous
from baton.engine.tensor_parallel.runner import TensorParallelRunner
from baton.engine.thread_policy import limit_spinning
from baton.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    # Torch is to be loaded late.
    import torch

    from baton.engine.communicator import Communicator, DistributedCommunicator

logger = logging.getLogger(__name__)

PoolMemoryFactory = Callable[[int], PoolMemory]
"""Bytes wanted -> memory of at least that size."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what its worker says of it."""

    engine: Engine
    layout: KvLayout
    num_blocks: int
    """Of the engine; the scratch blocks follow them in memory."""
    max_model_len: int
    """Tokens of prompt and output together that one sequence can have here."""
    pool_address: int
    pool_bytes: int
    """With the scratch blocks."""
    num_scratch_blocks: int
    ranks: RankGroup | None
    """The other ranks; to be closed after the last step. None: there is one rank."""
    kv: RankKv
    """The pool of rank 0. Where it holds a part of the heads, the other ranks' services have the
    others'."""


def build_engine(
    config: EngineConfig,
    *,
    clock: Clock,
    pool_memory_factory: PoolMemoryFactory | None = None,
    rank_service: RankServiceSpec | None = None,
    num_scratch_blocks: int = 0,
) -> BuiltEngine:
    """Load `config.model_path` and build the engine, with the processes of its other ranks.

    `rank_service` runs in each of those, see `rank_service`. `num_scratch_blocks` more blocks are
    allocated than the configuration asks for. Raises ConfigError, or Unavailable when a rank is
    lost. Sets the thread count and the allocator of the whole process, and imports
    torch only now.
    """
    if config.tp_size == 1:
        set_threads(config)
        from baton.engine.communicator import SingleCommunicator

        rank = build_rank(
            config,
            communicator=SingleCommunicator(),
            pool_memory_factory=pool_memory_factory,
            num_scratch_blocks=num_scratch_blocks,
        )
        return _built(config, clock, rank, rank.runner, None)
    check_tp_size(load_model_config(config.model_path), config.tp_size)
    if config.device is Device.CUDA:
        set_threads(config)
        _check_gpus(config.tp_size)
    group = RankGroup(config, rank_service, num_scratch_blocks=num_scratch_blocks)
    try:
        group.start()
        rank = build_root(config, group, pool_memory_factory)
        runner = TensorParallelRunner(
            rank.runner,
            group,
            block_size=config.block_size,
            num_threads=_thread_count(config.device),
        )
        return _built(config, clock, rank, runner, group)
    except Exception as error:
        # Rank 0 may only have noticed that another one was gone.
        cause = error if isinstance(error, BatonError) else group.lost(error)
        group.close()
        if cause is error:
            raise
        raise cause from error
    except BaseException:
        group.close()
        raise


def build_rank(
    config: EngineConfig,
    *,
    communicator: Communicator,
    pool_memory_factory: PoolMemoryFactory | None,
    num_scratch_blocks: int = 0,
) -> BuiltRank:
    """Load the weights of the communicator's rank and make its KV pool.

    Every rank of a group does this at the same time and may meet the others in collectives.
    `pool_memory_factory` serves pools in host memory. Raises ConfigError.
    """
    if config.device is Device.CUDA:
        # Only the GPU engine needs Triton at run time.
        from baton.engine.gpu.build import build_gpu_rank

        return build_gpu_rank(
            config, communicator=communicator, num_scratch_blocks=num_scratch_blocks
        )
    return _build_cpu_rank(config, communicator, pool_memory_factory, num_scratch_blocks)


def connect_ranks(
    config: EngineConfig, parallel: Parallel, *, rendezvous: Rendezvous, timeout_s: float
) -> DistributedCommunicator:
    """Meet the other ranks of the group; see `DistributedCommunicator.connect`."""
    turn_multicast_off(os.environ)
    import torch

    from baton.engine.communicator import DistributedCommunicator

    on_gpu = config.device is Device.CUDA
    device = torch.device("cuda", parallel.tp_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        _check_gpus(parallel.tp_rank + 1)
        torch.cuda.set_device(device)
    communicator = DistributedCommunicator.connect(
        parallel, device=device, rendezvous=rendezvous, timeout_s=timeout_s
    )
    if on_gpu:
        _use_mapped_memory(communicator, device, timeout_s)
    return communicator


def _check_gpus(num_gpus: int) -> None:
    """Raises ConfigError where fewer are visible."""
    from baton.engine.gpu.device import check_gpu

    check_gpu(num_gpus - 1)


def _use_mapped_memory(
    communicator: DistributedCommunicator, device: torch.device, timeout_s: float
) -> None:
    """Sum small tensors through the ranks' mapped memory, where all GPUs can map each other's."""
    from kernels.one_shot_group import OneShotAllReduce

    try:
        small = OneShotAllReduce.connect(communicator.group, device=device, deadline_s=timeout_s)
    except RuntimeError as error:
        logger.warning("no mapped memory between the ranks, NCCL sums all tensors: %s", error)
        small = None
    if communicator.smallest(int(small is not None)) and small is not None:
        communicator.use_for_small(small)


def set_threads(config: EngineConfig) -> None:
    """Import torch with this rank's share of the cores, or of `config.num_threads`."""
    limit_spinning()
    import torch

    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, num_threads // config.tp_size))
    keep_freed_memory()


def build_root(
    config: EngineConfig, group: RankGroup, pool_memory_factory: PoolMemoryFactory | None
) -> BuiltRank:
    """Rank 0 of a group, once all other ranks are ready too."""

    def make_pool(num_bytes: int) -> PoolMemory:
        if pool_memory_factory is not None:
            pool = pool_memory_factory(num_bytes)
            if pool.fd is None:
                raise ConfigError(f"tp_size {config.tp_size} needs pool memory that can be shared")
            group.share_pool(pool.fd, num_bytes)
            return pool
        pool = map_shared_pool(num_bytes)
        assert pool.fd is not None
        try:
            group.share_pool(pool.fd, num_bytes)
        finally:
            os.close(pool.fd)
        return pool

    set_threads(config)
    group.wait_until_started()
    communicator = _meet(config, group)
    group.on_failure(lambda reason: communicator.abort())
    rank = build_rank(
        config,
        communicator=communicator,
        pool_memory_factory=pool_memory_factory if config.pool_per_rank else make_pool,
        num_scratch_blocks=group.num_scratch_blocks,
    )
    group.wait_until_ready()
    return rank


def _meet(config: EngineConfig, group: RankGroup) -> DistributedCommunicator:
    """Rank 0's `connect_ranks`, given up when another rank is lost meanwhile."""
    rendezvous = Rendezvous(group.rendezvous)

    def connect() -> DistributedCommunicator:
        return connect_ranks(
            config,
            Parallel(0, config.tp_size),
            rendezvous=rendezvous,
            timeout_s=group.call_timeout_s,
        )

    return group.unless_lost(connect, rendezvous.interrupt)


def _build_cpu_rank(
    config: EngineConfig,
    communicator: Communicator,
    pool_memory_factory: PoolMemoryFactory | None,
    num_scratch_blocks: int,
) -> BuiltRank:
    from baton.engine.model_runner import ModelRunner
    from baton.engine.weights import load_model

    parallel = Parallel(communicator.rank, communicator.size)
    model = load_model(config, parallel=parallel)
    release_freed_memory()
    rank_layout = model.rank_layout(config.block_size)
    num_blocks = rank_layout.num_blocks_in(config.kv_cache_bytes or DEFAULT_CPU_KV_CACHE_BYTES)
    layout = rank_layout if config.pool_per_rank else model.layout(config.block_size)
    num_allocated = num_blocks + num_scratch_blocks
    memory = None
    if pool_memory_factory is not None:
        memory = pool_memory_factory(num_allocated * layout.block_bytes).memory
    runner = ModelRunner(model, config, layout, num_allocated, memory, communicator)
    return BuiltRank(
        runner=runner,
        layout=model.layout(config.block_size),
        num_blocks=num_blocks,
        max_model_len=model.max_model_len,
        vocab_size=model.model_config.vocab_size,
        pool_address=runner.pool_address,
        pool_bytes=runner.pool_bytes,
        num_scratch_blocks=num_scratch_blocks,
        pool_parallel=parallel if config.pool_per_rank else SINGLE,
    )


def _built(
    config: EngineConfig, clock: Clock, rank: BuiltRank, runner: Runner, group: RankGroup | None
) -> BuiltEngine:
    engine = Engine(
        config=config,
        layout=rank.layout,
        num_blocks=rank.num_blocks,
        max_model_len=rank.max_model_len,
        runner=runner,
        clock=clock,
        vocab_size=rank.vocab_size,
        grammars=_grammar_compiler(config, rank.vocab_size),
    )
    return BuiltEngine(
        engine=engine,
        layout=rank.layout,
        num_blocks=rank.num_blocks,
        max_model_len=engine.max_num_tokens,
        pool_address=rank.pool_address,
        pool_bytes=rank.pool_bytes,
        num_scratch_blocks=rank.num_scratch_blocks,
        ranks=group,
        kv=rank.kv,
    )


def _grammar_compiler(config: EngineConfig, vocab_size: int) -> GrammarCompiler | None:
    """None for a folder without a tokenizer, as benchmarks use. Nothing is read before the first
    structured output comes."""
    if not (config.model_path / "tokenizer.json").is_file():
        return None
    return GrammarCompiler(
        lambda: grammar_tokenizer(Tokenizer.from_folder(config.model_path), vocab_size)
    )


def _thread_count(device: Device) -> Callable[[], int]:
    """What the other ranks are to take, see `messages.Step`."""
    if device is Device.CUDA:
        return lambda: 0
    import torch

    return torch.get_num_threads
