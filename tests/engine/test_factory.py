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


def test_small_pool_limits_the_context(tiny_dir: Path) -> None:
    config = EngineConfig(model_path=tiny_dir, kv_cache_bytes=40 << 10)
    built = build_engine(config, clock=ManualClock())
    assert built.max_model_len == built.num_blocks * 16 < 512


def test_pool_below_one_block_is_refused(tiny_dir: Path) -> None:
    config = EngineConfig(model_path=tiny_dir, kv_cache_bytes=100)
    with pytest.raises(ConfigError, match="kv_cache_bytes 100 is below one block"):
        build_engine(config, clock=ManualClock())
