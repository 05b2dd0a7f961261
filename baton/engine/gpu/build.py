"""Builds one rank of the GPU engine: weights, measured memory, KV pool, captured steps.

    weights ─► run the largest step ─► plan the KV pool ─► allocate it ─► compile ─► capture graphs

Ranks of a group agree on the number of blocks, since the scheduler hands out the same block ids to
all. Not known here: scheduling, processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.engine.checkpoint import LoadProgress
from baton.engine.communicator import Communicator
from baton.engine.config import EngineConfig
from baton.engine.gpu.device import ComputeDevice, CudaDevice
from baton.engine.gpu.graphs import Progress, chunk_buckets, decode_buckets
from baton.engine.gpu.kv_pool import GpuKvPool
from baton.engine.gpu.limits import check_gpu_limits
from baton.engine.gpu.linear import GpuLinear, GpuLinears, LaunchOptions
from baton.engine.gpu.measure import (
    decode_counts,
    expected_graph_bytes,
    give_back_memory,
    largest_step,
    num_blocks_of,
    peak_bytes,
    warm_up_mix,
    warm_up_slice,
)
from baton.engine.gpu.memory_plan import GIB, KvDemand, MemoryReadings, plan_kv_blocks
from baton.engine.gpu.model import GpuLlama
from baton.engine.gpu.rank import GpuRank, RankLimits
from baton.engine.gpu.runner import GpuRunner
from baton.engine.gpu.sampler import GpuSampler
from baton.engine.model_config import load_model_config
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel.rank_runner import BuiltRank
from baton.engine.weights import LoadedModel, load_model

logger = logging.getLogger(__name__)

WARM_UP_LENGTHS = (3, 8, 12, 16, 24, 32, 48, 64, 70, 100, 128, 200, 256, 1000, 1024, 4096)
"""Chunks whose kernels differ: by rows of a tile, by whether sizes are multiples of 16."""
PROGRESS_PERIOD_S = 2.0
"""Between two lines about the same long work."""


def build_gpu_rank(
    config: EngineConfig,
    *,
    communicator: Communicator,
    device: ComputeDevice | None = None,
    num_scratch_blocks: int = 0,
) -> BuiltRank:
    """Load and prepare the communicator's rank; returns when its first step can be launched.

    `device` None takes the GPU of the rank's number. `num_scratch_blocks` lie behind the blocks
    of the engine, which does not know them. Raises ConfigError when the model does not
    fit, with what would.
    """
    device = device or CudaDevice(communicator.rank)
    builder = RankBuilder(config, communicator, device, num_scratch_blocks)
    with device.stream(), torch.inference_mode():
        return builder.build()


@dataclass(frozen=True, slots=True)
class RankBuilder:
    """The parts of a rank, and the order they are made in. Used inside the device's stream."""

    config: EngineConfig
    communicator: Communicator
    device: ComputeDevice
    num_scratch_blocks: int = 0

    def build(self) -> BuiltRank:
        config, device = self.config, self.device
        check_gpu_limits(load_model_config(config.model_path), config)
        used_before = device.total_bytes() - device.free_bytes()
        model = self.load()
        weight_bytes = device.total_bytes() - device.free_bytes() - used_before
        vocab_size = model.model_config.vocab_size
        sampler = None
        if self.communicator.rank == 0:
            sampler = GpuSampler(vocab_size, config.max_num_seqs, device.device)
        num_blocks = self._plan(model, used_before, weight_bytes)
        pool = self.pool(model, num_blocks + self.num_scratch_blocks)
        rank = self.rank(model, pool, num_blocks)
        if device.is_gpu:
            # Before there are graphs, which would be replayed instead.
            longest = min(model.max_model_len, num_blocks * config.block_size)
            self.warm_up(rank, sampler, vocab_size, longest)
        rank.prepare_steps(
            self.decode_buckets,
            self.chunk_buckets,
            is_graphed=device.is_gpu,
            on_progress=_log_progress("captured graphs"),
        )
        runner = GpuRunner(
            rank,
            sampler,
            device,
            self.communicator,
            vocab_size=vocab_size,
            block_size=config.block_size,
        )
        return BuiltRank(
            runner=runner,
            layout=model.layout(config.block_size),
            num_blocks=num_blocks,
            max_model_len=model.max_model_len,
            vocab_size=vocab_size,
            pool_address=pool.address,
            pool_bytes=pool.num_bytes,
            num_scratch_blocks=self.num_scratch_blocks,
            pool_parallel=Parallel(self.communicator.rank, self.communicator.size),
            device_id=device.device.index,
        )

    @property
    def decode_buckets(self) -> list[int]:
        """Batch sizes of captured decode steps."""
        return decode_buckets(min(self.config.max_graph_batch_size, self.config.max_num_seqs))

    @property
    def chunk_buckets(self) -> list[int]:
        """Tokens of captured chunks. With several ranks none: rank 0 alone knows which chunks are
        told by layers, and those are not padded."""
        if self.communicator.size > 1 or not self.decode_buckets:
            return []
        return chunk_buckets(self.config.max_num_batched_tokens)

    def warm_up(
        self, rank: GpuRank, sampler: GpuSampler | None, vocab_size: int, longest: int
    ) -> None:
        """Compile what requests will need, so that none of them waits for a compiler.

        `longest`: tokens that a sequence can have.
        """
        config = self.config
        longest = min(longest, config.max_num_batched_tokens)
        lengths = [*(n for n in WARM_UP_LENGTHS if n < longest), longest]
        report = _log_progress("compiled prefill steps")
        for done, length in enumerate(lengths):
            report(done, len(lengths))
            rank.run([warm_up_slice(length, config.block_size)])
            # The next step is packed where this one's inputs are still being copied from.
            self.device.record().wait()
        report(len(lengths), len(lengths))
        # Beside chunks, decode attention is made for the next power of two of the batch size.
        for count in decode_counts(config.max_num_seqs):
            rank.run(warm_up_mix(count, config.block_size))
            self.device.record().wait()
        if sampler is not None:
            shape = (config.max_num_seqs, vocab_size)
            dtype = getattr(torch, config.dtype)
            logits = torch.zeros(shape, dtype=dtype, device=self.device.device)
            sampler.warm_up(logits, rank.last_tokens)
        self.device.record().wait()

    def load(self) -> LoadedModel[GpuLinear]:
        config, device = self.config, self.device.device
        options = LaunchOptions.allocate(device, is_pdl=self.device.is_gpu)
        return load_model(
            config,
            parallel=Parallel(self.communicator.rank, self.communicator.size),
            device=device,
            linears=GpuLinears(getattr(torch, config.dtype), options),
            on_progress=_log_bytes("loaded weights"),
        )

    def _plan(self, model: LoadedModel[GpuLinear], used_before: int, weight_bytes: int) -> int:
        """Blocks of every rank's pool."""
        config = self.config
        layout = model.rank_layout(config.block_size)
        block_bytes = layout.block_bytes
        if config.kv_cache_bytes is not None:
            return self.communicator.smallest(layout.num_blocks_in(config.kv_cache_bytes))
        held = self.device.total_bytes() - self.device.free_bytes() - used_before - weight_bytes
        activations = self._measure_activations(model)
        # The pool that was measured with makes room for the real one.
        give_back_memory(self.device)
        readings = MemoryReadings(
            total=self.device.total_bytes(),
            used_before=used_before,
            weights=weight_bytes,
            activations=activations + held + self.num_scratch_blocks * block_bytes,
            graphs=expected_graph_bytes(
                activations,
                config.max_num_batched_tokens,
                self.decode_buckets,
                self.chunk_buckets,
                model.shard.vocab_rows * model.weights.embedding.element_size(),
            ),
        )
        demand = KvDemand(block_bytes, config.block_size, model.max_model_len)
        num_blocks = plan_kv_blocks(readings, demand, fraction=config.gpu_memory_fraction)
        logger.info(
            "GPU memory: weights %.2f GiB, activations %.2f GiB, graphs %.2f GiB, KV %.2f GiB "
            "(%d blocks of %d tokens)",
            weight_bytes / GIB,
            readings.activations / GIB,
            readings.graphs / GIB,
            num_blocks * block_bytes / GIB,
            num_blocks,
            config.block_size,
        )
        return self.communicator.smallest(num_blocks)

    def _measure_activations(self, model: LoadedModel[GpuLinear]) -> int:
        config = self.config
        slices = largest_step(
            max_num_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=model.max_model_len,
            block_size=config.block_size,
        )
        num_blocks = num_blocks_of(slices)
        pool = self.pool(model, num_blocks)
        # Made inside: the buffers of a rank are part of what it takes.
        return peak_bytes(self.device, lambda: self.rank(model, pool, num_blocks).run(slices))

    def pool(self, model: LoadedModel[GpuLinear], num_blocks: int) -> GpuKvPool:
        scales = model.pool_scales()
        return GpuKvPool(
            model.rank_layout(self.config.block_size),
            num_blocks,
            device=self.device.device,
            k_scale=None if scales is None else scales.k,
            v_scale=None if scales is None else scales.v,
        )

    def rank(self, model: LoadedModel[GpuLinear], pool: GpuKvPool, num_blocks: int) -> GpuRank:
        """`num_blocks` of the pool are for sequences."""
        config = self.config
        # A sequence is no longer than the pool; the measured step may hold longer ones.
        longest = min(model.max_model_len, num_blocks * config.block_size)
        llama = GpuLlama(
            model.model_config,
            model.weights,
            pool,
            self.communicator,
            max_positions=longest,
            max_num_seqs=config.max_num_seqs,
            vocab_rows=model.shard.vocab_rows,
            is_pdl=self.device.is_gpu,
        )
        limits = RankLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=config.max_num_batched_tokens,
            max_num_blocks=-(-longest // config.block_size),
            block_size=config.block_size,
        )
        return GpuRank(llama, self.device, limits)


def _log_progress(what: str) -> Progress:
    """A line now and then, and one at the end."""
    last_at_s = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last_at_s
        now_s = time.monotonic()
        if done == total or now_s - last_at_s > PROGRESS_PERIOD_S:
            last_at_s = now_s
            logger.info("%s: %d of %d", what, done, total)

    return report


def _log_bytes(what: str) -> LoadProgress:
    report: Callable[[int, int], None] = _log_progress(f"{what} (MiB)")
    return lambda done, total: report(done >> 20, total >> 20)
