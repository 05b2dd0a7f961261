"""Two ranks of the GPU engine, with sampled tokens passed on between devices.

Under the interpreter the ranks are processes that meet over gloo; the launchers, the steps in
flight and the broadcast of samples are those of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny_llama
from baton.core.clock import WallClock
from baton.engine import factory
from baton.engine.config import Device, EngineConfig
from baton.engine.factory import build_engine
from baton.engine.tensor_parallel import process
from baton.engine.tensor_parallel.group import RankGroup
from gpu_harness import Output
from gpu_rank_child import build_interpreted_rank

TINY = {
    "vocab_size": 45,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture
def groups() -> Iterator[list[RankGroup]]:
    """Closed at the end."""
    groups: list[RankGroup] = []
    yield groups
    for group in groups:
        group.close()


def outputs(config: EngineConfig, groups: list[RankGroup]) -> dict[str, list[int]]:
    """A chunked prompt that starts in company, and tokens beyond it."""
    built = build_engine(config, clock=WallClock())
    if built.ranks is not None:
        groups.append(built.ranks)
    output = Output(built.engine)
    output.submit("short", [1, 2, 3], max_tokens=3)
    output.submit("chunked", list(range(10)), max_tokens=2, temperature=0.9, seed=7)
    output.run()
    return output.tokens


def test_two_gpu_ranks_make_the_tokens_of_one_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: list[RankGroup]
) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path, **TINY)
    settings = {
        "model_path": folder,
        "dtype": "float32",
        "max_num_seqs": 2,
        "max_num_batched_tokens": 8,
        "kv_cache_bytes": 1 << 18,
        "num_threads": 1,
    }
    expected = outputs(EngineConfig(**settings), groups)
    if not torch.cuda.is_available():
        monkeypatch.setattr(factory, "build_rank", build_interpreted_rank)
        monkeypatch.setattr(process, "MODULE", "gpu_rank_child")
        config = EngineConfig(**settings, tp_size=2)
    elif torch.cuda.device_count() > 1:
        config = EngineConfig(**settings, tp_size=2, device=Device.CUDA)
    else:
        pytest.skip("two ranks need two GPUs")
    assert outputs(config, groups) == expected
