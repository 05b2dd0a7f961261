"""The steps of the whole GPU engine, for two layers of Llama-3.1-8B's shape and a small vocabulary.

Compiling what the engine launches, as it launches it, finds what kernels by themselves do not
show: arguments that only the engine passes, dependent launch in all of them, strided rows.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from baton.core.block import BlockId
from baton.core.quantization import QuantizationConfig, Scheme, quantization_json
from baton.core.request import RequestId
from baton.engine.batch import SequenceSlice
from baton.engine.communicator import SingleCommunicator
from baton.engine.config import EngineConfig, LoadFormat
from baton.engine.gpu.device import InterpretedDevice
from baton.engine.gpu.kv_pool import GpuKvPool
from baton.engine.gpu.linear import GpuLinears, LaunchOptions
from baton.engine.gpu.measure import warm_up_slice
from baton.engine.gpu.model import GpuLlama
from baton.engine.gpu.rank import GpuRank, RankLimits
from baton.engine.gpu.sampler import GpuSampler
from baton.engine.weights import load_model
from bench.gpu.shapes import LLAMA_3_1_8B

SHAPE = dataclasses.replace(LLAMA_3_1_8B, num_layers=2, vocab_size=2048)
MAX_NUM_SEQS = 64
BLOCK_SIZE = 64
CPU = torch.device("cpu")


def single_tokens(count: int) -> list[SequenceSlice]:
    """A decode step of `count` sequences behind 100 tokens each."""
    blocks = (BlockId(0), BlockId(1))
    return [SequenceSlice(RequestId(f"r{i}"), 100, (1,), False, blocks, True) for i in range(count)]


def launch_steps(scheme: Scheme | None, kv_cache_dtype: str) -> None:
    changes: dict[str, Any] = {}
    if scheme is not None:
        group_size = 128 if scheme is Scheme.INT4 else None
        changes["quantization_config"] = quantization_json(QuantizationConfig(scheme, group_size))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        config = EngineConfig(
            model_path=SHAPE.write_config(Path(folder), **changes),
            load_format=LoadFormat.DUMMY,
            block_size=BLOCK_SIZE,
            max_model_len=2048,
            kv_cache_dtype=kv_cache_dtype,
        )
        run_steps(config)


def run_steps(config: EngineConfig) -> None:
    linears = GpuLinears(torch.bfloat16, LaunchOptions.allocate(CPU, is_pdl=True))
    model = load_model(config, device=CPU, linears=linears)
    scales = model.pool_scales()
    pool = GpuKvPool(
        model.rank_layout(BLOCK_SIZE),
        32,
        device=CPU,
        k_scale=None if scales is None else scales.k,
        v_scale=None if scales is None else scales.v,
    )
    llama = GpuLlama(
        model.model_config,
        model.weights,
        pool,
        SingleCommunicator(),
        max_positions=2048,
        max_num_seqs=MAX_NUM_SEQS,
        vocab_rows=SHAPE.vocab_size,
        is_pdl=True,
    )
    rank = GpuRank(llama, InterpretedDevice(), RankLimits(MAX_NUM_SEQS, 1024, 32, BLOCK_SIZE))
    rank.prepare_steps([1, 8, 64], [100], is_graphed=False, on_progress=lambda done, total: None)
    for count in (1, 8, 40):
        rank.run(single_tokens(count))
    rank.run([*single_tokens(3), warm_up_slice(1000, BLOCK_SIZE)])
    rank.run([warm_up_slice(90, BLOCK_SIZE)])
    sampler = GpuSampler(SHAPE.vocab_size, MAX_NUM_SEQS, CPU)
    logits = torch.zeros(MAX_NUM_SEQS, SHAPE.vocab_size, dtype=torch.bfloat16)
    sampler.warm_up(logits, rank.last_tokens)


CASES: dict[str, Callable[[], None]] = {
    "engine bf16": functools.partial(launch_steps, None, "auto"),
    "engine bf16, fp8 KV": functools.partial(launch_steps, None, "fp8"),
    **{
        f"engine {scheme.value}": functools.partial(launch_steps, scheme, "auto")
        for scheme in Scheme
    },
}
# Decode attention of bfloat16 is held to 168 registers for three programs a multiprocessor; what
# spills is used outside its loop.
ALLOWED_SPILL_BYTES = dict.fromkeys(CASES, 64)
QUICK_CASES = {"engine bf16"}
