"""Building an engine: memory from outside, settings that cannot work, a first token."""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path
from typing import Any

import pytest

from baton.core.clock import ManualClock
from baton.core.errors import ConfigError
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from baton.engine.host_memory import PoolMemory

_SPEC = importlib.util.spec_from_file_location(
    "factory_tiny_llama", Path(__file__).parents[1] / "support/tiny_llama.py"
)
assert _SPEC is not None and _SPEC.loader is not None
tiny_llama: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_llama)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("is_given", [False, True])
def test_built_engine_generates(tiny_dir: Path, is_given: bool) -> None:
    config = EngineConfig(model_path=tiny_dir, kv_cache_bytes=1 << 20, num_threads=2)
    wanted: list[int] = []

    def make(num_bytes: int) -> PoolMemory:
        wanted.append(num_bytes)
        return PoolMemory(memoryview(mmap.mmap(-1, num_bytes)), None)

    built = build_engine(
        config, clock=ManualClock(), pool_memory_factory=make if is_given else None
    )
    assert built.num_blocks == (1 << 20) // built.layout.block_bytes
    assert built.pool_bytes == built.num_blocks * built.layout.block_bytes
    assert wanted == ([built.pool_bytes] if is_given else [])
    assert built.max_model_len == 512
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    request = GenerateRequest(RequestId("r"), Work.GENERATE, (1, 2, 3), sampling)
    built.engine.submit(request)
    token_ids: list[int] = []
    while built.engine.has_work:
        token_ids += [t for d in built.engine.step().deltas for t in d.token_ids]
    assert len(token_ids) == 5
    assert built.engine.is_empty
    built.engine.check_integrity()


def test_scratch_blocks_lie_behind_those_of_the_engine(tiny_dir: Path) -> None:
    config = EngineConfig(model_path=tiny_dir, kv_cache_bytes=1 << 20, num_threads=2)
    memories: list[Any] = []

    def make(num_bytes: int) -> PoolMemory:
        memories.append(mmap.mmap(-1, num_bytes))
        return PoolMemory(memoryview(memories[-1]), None)

    built = build_engine(
        config, clock=ManualClock(), pool_memory_factory=make, num_scratch_blocks=3
    )
    block_bytes = built.layout.block_bytes
    assert (built.num_blocks, built.num_scratch_blocks) == ((1 << 20) // block_bytes, 3)
    assert built.pool_bytes == (built.num_blocks + 3) * block_bytes == len(memories[0])
    assert built.engine.load().total_blocks == built.num_blocks
    # What the engine writes when all its blocks are in use never reaches them.
    sampling = SamplingParams(max_tokens=512, temperature=0.0, ignore_eos=True)
    for n in range(built.num_blocks // 8):
        prompt = tuple((n + i) % 320 for i in range(200))
        built.engine.submit(GenerateRequest(RequestId(str(n)), Work.GENERATE, prompt, sampling))
    for _ in range(12):
        built.engine.step()
    first = built.num_blocks * block_bytes
    assert any(memories[0][:first])
    assert not any(memories[0][first:])


def test_ranks_of_a_group_share_the_scratch_blocks(tiny_dir: Path) -> None:
    config = EngineConfig(model_path=tiny_dir, kv_cache_bytes=1 << 19, num_threads=1, tp_size=2)
    built = build_engine(config, clock=ManualClock(), num_scratch_blocks=5)
    assert built.ranks is not None
    try:
        assert built.pool_bytes == (built.num_blocks + 5) * built.layout.block_bytes
        assert built.num_scratch_blocks == 5
    finally:
        built.ranks.close()


def test_small_pool_limits_the_context(tiny_dir: Path) -> None:
    config = EngineConfig(model_path=tiny_dir, kv_cache_bytes=40 << 10)
    built = build_engine(config, clock=ManualClock())
    assert built.max_model_len == built.num_blocks * 16 < 512


def test_pool_below_one_block_is_refused(tiny_dir: Path) -> None:
    config = EngineConfig(model_path=tiny_dir, kv_cache_bytes=100)
    with pytest.raises(ConfigError, match="kv_cache_bytes 100 is below one block"):
        build_engine(config, clock=ManualClock())
