"""Pools whose KV blocks differ are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError
from baton.engine.config import Device, EngineConfig, LoadFormat
from services.launch.compatibility import check_pools_match


def engine(**changes: Any) -> EngineConfig:
    return EngineConfig(model_path=Path("/models/llama"), **changes)


@pytest.mark.parametrize(
    "decode",
    [
        {},
        {"max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_bytes": 1 << 20},
        {"tp_size": 2, "pool_per_rank": True},
    ],
)
def test_what_does_not_change_a_block_may_differ(decode: dict[str, Any]) -> None:
    check_pools_match(engine(), engine(**decode))


@pytest.mark.parametrize(
    ("name", "prefill", "decode", "shown"),
    [
        ("kv_cache_dtype", "fp8", "auto", ("fp8", "auto")),
        ("dtype", "float32", "bfloat16", ("float32", "bfloat16")),
        ("block_size", 16, 64, ("16", "64")),
        ("device", Device.CPU, Device.CUDA, ("cpu", "cuda")),
        ("revision", "a", "b", ("a", "b")),
        ("load_format", LoadFormat.DUMMY, LoadFormat.AUTO, ("dummy", "auto")),
    ],
)
def test_what_changes_a_block_is_refused_with_both_values_and_the_fix(
    name: str, prefill: Any, decode: Any, shown: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_pools_match(engine(**{name: prefill}), engine(**{name: decode}))
    message = str(error.value)
    assert f"engine.{name} is {shown[0]} in the prefill pool and {shown[1]} in the" in message
    assert f"--set decode.engine.{name}={shown[0]}" in message
    assert f"--set prefill.engine.{name}={shown[1]}" in message


def test_fp8_blocks_are_the_same_whatever_the_weights_are() -> None:
    prefill = engine(dtype="float32", kv_cache_dtype="fp8")
    check_pools_match(prefill, engine(dtype="bfloat16", kv_cache_dtype="fp8"))
