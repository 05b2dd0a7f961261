"""Measured figures of workers, as a JSON file: one entry a size.

    {"source": "...", "kv_bytes_per_token": 819200, "workers": [
        {"tensor_parallel": 1, "max_kv_tokens": 55000, "start_s": 40,
         "step_fixed_s": 0.018, "prefill_token_s": 0.0001, "prefill_pair_s": 1e-8,
         "decode_sequence_s": 4e-5, "decode_kv_token_s": 6e-7, "link_bytes_per_second": 2e11,
         "decode_step_fixed_s": 0.0199}]}

`decode_step_fixed_s` is for engines whose decode steps cost something else than their prompts'.
Does not know: where the figures were measured.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError
from baton.simulator.hardware import Hardware
from services.planner.pool_model import PoolModel

_OPTIONAL = ("link_latency_s", "message_s", "decode_step_fixed_s", "start_s")
_HARDWARE = tuple(field.name for field in dataclasses.fields(Hardware))
_KNOWN = {*_HARDWARE, *_OPTIONAL, "tensor_parallel", "max_kv_tokens"}


@dataclass(frozen=True, slots=True)
class Profile:
    """Workers of each size that was measured, by tensor-parallel size."""

    prefill: dict[int, PoolModel]
    decode: dict[int, PoolModel]
    kv_bytes_per_token: int
    source: str


def read_profile(path: Path) -> Profile:
    """Raises ConfigError naming the file, the entry and the key that is wrong."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the profile {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); see `baton plan --help`") from None
    if not isinstance(data, dict) or not isinstance(data.get("workers"), list):
        raise ConfigError(f'{path}: "workers" must be a list with one entry a size')
    source = str(data.get("source", path.name))
    prefill: dict[int, PoolModel] = {}
    decode: dict[int, PoolModel] = {}
    for i, entry in enumerate(data["workers"]):
        where = f"{path}: workers[{i}]"
        pool = _pool(entry, where, source)
        if pool.tensor_parallel in prefill:
            raise ConfigError(f"{where}: tensor_parallel {pool.tensor_parallel} is there twice")
        prefill[pool.tensor_parallel] = pool
        decode[pool.tensor_parallel] = _decode_pool(pool, entry, where)
    if not prefill:
        raise ConfigError(f'{path}: "workers" is empty')
    kv_bytes = _number(data, "kv_bytes_per_token", str(path))
    return Profile(prefill, decode, int(kv_bytes), source)


def _pool(entry: Any, where: str, source: str) -> PoolModel:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be an object, got {type(entry).__name__}")
    if unknown := sorted(set(entry) - _KNOWN):
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KNOWN))}"
        )
    names = [n for n in _HARDWARE if n in entry or n not in _OPTIONAL]
    seconds = {name: _number(entry, name, where) for name in names}
    if seconds["link_bytes_per_second"] <= 0:
        raise ConfigError(f"{where}: link_bytes_per_second must be above 0, got 0")
    return PoolModel(
        int(_number(entry, "tensor_parallel", where)),
        Hardware(**seconds),
        int(_number(entry, "max_kv_tokens", where)),
        _number(entry, "start_s", where) if "start_s" in entry else 60.0,
        source,
    )


def _decode_pool(pool: PoolModel, entry: dict[str, Any], where: str) -> PoolModel:
    if "decode_step_fixed_s" not in entry:
        return pool
    fixed_s = _number(entry, "decode_step_fixed_s", where)
    return dataclasses.replace(
        pool, hardware=dataclasses.replace(pool.hardware, step_fixed_s=fixed_s)
    )


def _number(entry: dict[str, Any], key: str, where: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise ConfigError(f"{where}: {key} must be a number of at least 0, got {value!r}")
    return float(value)
