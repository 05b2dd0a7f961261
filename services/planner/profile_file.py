"""Measured figures of workers, as a JSON file: one entry a size, or one a size and pool.

    {"source": "...", "kv_bytes_per_token": 819200, "workers": [
        {"tensor_parallel": 1, "pool": "prefill", "max_kv_tokens": 55000, "start_s": 40,
         "step_fixed_s": 0.018, "prefill_token_s": 0.0001, "prefill_pair_s": 1e-8,
         "decode_sequence_s": 4e-5, "decode_kv_token_s": 6e-7, "link_bytes_per_second": 2e11},
        {"tensor_parallel": 1, "pool": "decode", ...}]}

An entry without `pool` is for both; with `decode_step_fixed_s` its decode steps cost something else
than those of prompts. `residuals` say how well the figures fit what was measured, and are not read.
Does not know: where the figures were measured.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.simulator.hardware import Hardware
from services.planner.pool_model import PoolModel

_OPTIONAL = (
    "link_latency_s", "message_s", "step_gap_s", "request_s", "request_token_s", "neighbour_share",
)  # fmt: skip
_HARDWARE = tuple(field.name for field in dataclasses.fields(Hardware))
_OTHERS = (
    "tensor_parallel", "pool", "max_kv_tokens", "start_s", "decode_step_fixed_s", "residuals",
)  # fmt: skip
_KNOWN = {*_HARDWARE, *_OTHERS}
_POOLS: dict[Any, tuple[Role, ...]] = {
    None: (Role.PREFILL, Role.DECODE),
    "prefill": (Role.PREFILL,),
    "decode": (Role.DECODE,),
}


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
    if not data["workers"]:
        raise ConfigError(f'{path}: "workers" is empty')
    source = str(data.get("source", path.name))
    pools: dict[Role, dict[int, PoolModel]] = {Role.PREFILL: {}, Role.DECODE: {}}
    for i, entry in enumerate(data["workers"]):
        where = f"{path}: workers[{i}]"
        model = _pool(entry, where, source)
        for role in _roles(entry, where):
            if model.tensor_parallel in pools[role]:
                raise ConfigError(
                    f"{where}: tensor_parallel {model.tensor_parallel} is there twice for "
                    f"{role.value} workers"
                )
            own = model if role is Role.PREFILL else _decode_pool(model, entry, where)
            pools[role][model.tensor_parallel] = own
    for role, sizes in pools.items():
        if not sizes:
            raise ConfigError(f'{path}: "workers" has no entry for {role.value} workers')
    kv_bytes = _number(data, "kv_bytes_per_token", str(path))
    return Profile(pools[Role.PREFILL], pools[Role.DECODE], int(kv_bytes), source)


def profile_json(
    prefill: PoolModel, decode: PoolModel, *, kv_bytes_per_token: int, source: str
) -> dict[str, Any]:
    """What `read_profile` reads, for one size of each pool."""
    return {
        "source": source,
        "kv_bytes_per_token": kv_bytes_per_token,
        "workers": [_entry(Role.PREFILL, prefill), _entry(Role.DECODE, decode)],
    }


def _entry(role: Role, model: PoolModel) -> dict[str, Any]:
    return {
        "tensor_parallel": model.tensor_parallel,
        "pool": role.value,
        "max_kv_tokens": model.max_kv_tokens,
        "start_s": model.start_s,
        **dataclasses.asdict(model.hardware),
    }


def _roles(entry: dict[str, Any], where: str) -> tuple[Role, ...]:
    pool = entry.get("pool")
    if not isinstance(pool, str | None) or pool not in _POOLS:
        raise ConfigError(f'{where}: pool must be "prefill" or "decode", got {pool!r}')
    return _POOLS[pool]


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
