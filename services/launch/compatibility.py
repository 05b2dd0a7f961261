"""Whether workers of two pools can hand KV blocks to each other, by their settings alone.

Workers compare the layouts of their KV when they meet, and routers pair none that differ: pools
that cannot work together would start and never hand anything over. The fields here are the device
and those settings that enter `KvLayout`. Not known here: models, processes.
"""

from __future__ import annotations

from enum import Enum

from baton.core.errors import ConfigError
from baton.engine.config import EngineConfig


def check_pools_match(prefill: EngineConfig, decode: EngineConfig) -> None:
    """Raises ConfigError naming a setting, both values and the fix where blocks would differ."""
    pairs: dict[str, tuple[object, object]] = {
        # No transport reads the memory of GPUs into that of the host, or the other way.
        "device": (prefill.device, decode.device),
        "kv_cache_dtype": (prefill.kv_cache_dtype, decode.kv_cache_dtype),
        "block_size": (prefill.block_size, decode.block_size),
        # Random weights are a model of their own.
        "load_format": (prefill.load_format, decode.load_format),
        "revision": (prefill.revision, decode.revision),
    }
    if prefill.kv_cache_dtype == "auto":
        pairs["dtype"] = (prefill.dtype, decode.dtype)
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            first, second = _text(ours), _text(theirs)
            raise ConfigError(
                f"engine.{name} is {first} in the prefill pool and {second} in the decode pool, "
                "which cannot exchange KV so; make them equal with "
                f"--set decode.engine.{name}={first} or --set prefill.engine.{name}={second}"
            )


def _text(value: object) -> str:
    return str(value.value if isinstance(value, Enum) else value)
