"""The whole GPU engine against the CPU engine: same requests, same tokens.

The model is tiny and float32, so that tokens are equal and the interpreter is not slow for ever.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import tiny_llama
from baton.core.clock import WallClock
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from baton.engine.gpu.device import ComputeDevice
from gpu_harness import Output, gpu_engine

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}


def tiny_config(folder: Path, **settings: Any) -> EngineConfig:
    fields: dict[str, Any] = {
        "model_path": folder,
        "dtype": "float32",
        "max_num_seqs": 3,
        "max_num_batched_tokens": 12,
        "kv_cache_bytes": 1 << 19,
        "num_threads": 1,
    }
    return EngineConfig(**(fields | settings))


def submit_all(output: Output) -> None:
    """Chunks beside single tokens, greedy beside drawn, penalties, alternatives, lengths of 1."""
    rng = random.Random(11)
    prompts = [[rng.randrange(TINY["vocab_size"]) for _ in range(n)] for n in (3, 17, 1)]
    output.submit("greedy", prompts[0], max_tokens=5, logprobs=2)
    output.submit("drawn", prompts[1], max_tokens=3, temperature=0.9, seed=7, top_p=0.9, top_k=12)
    output.submit(
        "penalised", prompts[2], max_tokens=4, repetition_penalty=1.5, logit_bias=((3, 2.0),)
    )


@pytest.mark.parametrize(
    "shape", ["plain", "one_kv_head_dim_32_tied", "biases"], ids=lambda name: str(name)
)
def test_tokens_equal_those_of_the_cpu_engine(
    tmp_path: Path, compute_device: ComputeDevice, shape: str
) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **(tiny_llama.SHAPES[shape] | TINY))
    config = tiny_config(folder)
    expected = Output(build_engine(config, clock=WallClock()).engine)
    actual = Output(gpu_engine(config, compute_device))
    for output in (expected, actual):
        submit_all(output)
        output.run()
    assert actual.tokens == expected.tokens
    assert [len(t) for t in actual.tokens.values()] == [5, 3, 4]
    for ours, theirs in zip(actual.logprobs["greedy"], expected.logprobs["greedy"], strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [t for t, _ in ours.top] == [t for t, _ in theirs.top]


def test_fp8_kv_equals_the_cpu_engines(tmp_path: Path, compute_device: ComputeDevice) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **TINY)
    config = tiny_config(folder, kv_cache_dtype="fp8", max_graph_batch_size=0)
    expected = Output(build_engine(config, clock=WallClock()).engine)
    actual = Output(gpu_engine(config, compute_device))
    for output in (expected, actual):
        output.submit("a", [5, 9, 2, 44, 7], max_tokens=3)
        output.run()
    assert actual.tokens == expected.tokens


def test_measured_memory_makes_a_pool_that_works(
    tmp_path: Path, compute_device: ComputeDevice
) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **(TINY | {"num_hidden_layers": 1}))
    config = tiny_config(
        folder, kv_cache_bytes=None, gpu_memory_fraction=0.05, max_num_batched_tokens=4
    )
    engine = gpu_engine(config, compute_device)
    assert engine.load().total_blocks * config.block_size >= TINY["max_position_embeddings"]
    output = Output(engine)
    output.submit("a", [1, 2, 3], max_tokens=2)
    output.run()
    assert len(output.tokens["a"]) == 2


def test_prompts_that_come_alone_equal_the_cpu_engines(
    tmp_path: Path, compute_device: ComputeDevice
) -> None:
    """Whole prompts, padded to captured sizes; one of them behind a cached prefix."""
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **TINY)
    config = tiny_config(folder, max_num_batched_tokens=48, block_size=16)
    engines = (build_engine(config, clock=WallClock()).engine, gpu_engine(config, compute_device))
    expected, actual = (Output(engine) for engine in engines)
    rng = random.Random(12)
    prompt = [rng.randrange(TINY["vocab_size"]) for _ in range(48)]
    for length in (2, 19, 32, 48):
        for output in (expected, actual):
            output.submit(str(length), prompt[:length], max_tokens=3)
            output.run()
    assert actual.tokens == expected.tokens
