"""What a pool's settings ask of the model and of this machine's GPUs, before anything starts.

A tensor-parallel worker takes as many GPUs as it has ranks. Plain processes get GPUs of their own
while there are enough, and share them in turn otherwise: then gpu_memory_fraction has to be divided
by hand. Ray never shares a GPU between workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.core.config import build, merge
from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.engine.config import Device, EngineConfig, LoadFormat
from baton.engine.model_config import load_model_config
from baton.engine.tensor_parallel.limits import check_tp_size
from services.decode.config import DEFAULTS as DECODE_DEFAULTS
from services.launch.compatibility import check_pools_match
from services.launch.config import SystemConfig, worker_values
from services.prefill.config import DEFAULTS as PREFILL_DEFAULTS
from services.worker.config import defaults_for_device

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_DEFAULTS = {Role.PREFILL: PREFILL_DEFAULTS, Role.DECODE: DECODE_DEFAULTS}


def engine_config(system: SystemConfig, role: Role) -> EngineConfig:
    """As the workers of the pool will read it. Raises ConfigError naming the pool."""
    settings = worker_values(system, role, 0)
    values: dict[str, Any] = merge(defaults_for_device(_DEFAULTS[role], settings), settings)[
        "engine"
    ]
    try:
        return build(EngineConfig, values, where="engine.")
    except ConfigError as error:
        raise ConfigError(f"{role.value} pool: {error}") from error


def reads_weights(system: SystemConfig) -> bool:
    """Whether any worker loads what lies in the model folder. Raises ConfigError."""
    formats = {engine_config(system, role).load_format for role in system.roles}
    return formats != {LoadFormat.DUMMY}


def check_pools(system: SystemConfig, environ: Mapping[str, str], *, use_ray: bool) -> None:
    """Raises ConfigError for what cannot work: a tp_size, with those that are possible, pools whose
    KV differs or lies in different kinds of memory, or more GPUs than `environ` makes visible."""
    model = load_model_config(system.model_path)
    for role in system.roles:
        config = engine_config(system, role)
        try:
            check_tp_size(model, config.tp_size)
        except ConfigError as error:
            raise ConfigError(f"{role.value} pool: {error}") from error
    if system.num_prefill:
        check_pools_match(engine_config(system, Role.PREFILL), engine_config(system, Role.DECODE))
    demands = worker_demands(system)
    if not any(demands.values()):
        return
    gpus = visible_gpus(environ)
    assign_gpus(list(demands.values()), gpus)
    if use_ray and sum(demands.values()) > len(gpus):
        raise ConfigError(
            f"{len(demands)} workers need {sum(demands.values())} GPUs in all, and {len(gpus)} are "
            "visible; Ray gives each worker GPUs of its own: start fewer workers, lower tp_size, "
            f"make more visible ({VISIBLE_DEVICES}), or share them with --no-ray"
        )


def worker_demands(system: SystemConfig) -> dict[tuple[Role, int], int]:
    """How many GPUs each worker (role, index) takes. Raises ConfigError."""
    counts = {Role.PREFILL: system.num_prefill, Role.DECODE: system.num_decode}
    demands = {role: gpu_demand(engine_config(system, role)) for role in system.roles}
    return {(role, i): demands[role] for role in system.roles for i in range(counts[role])}


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Names of the GPUs that processes started here can use.

    Of a list in `environ` CUDA sees what stands before the first number that is none.
    """
    listed = environ.get(VISIBLE_DEVICES)
    if listed is not None:
        names = [name for part in listed.split(",") if (name := part.strip())]
        return list(itertools.takewhile(lambda name: not name.startswith("-"), names))
    return [str(i) for i in range(len(list(devices.glob("nvidia[0-9]*"))))]


def assign_gpus(demands: Sequence[int], gpus: Sequence[str]) -> list[list[str]]:
    """GPUs for each of several workers, who ask for `demands` of them; 0 for a CPU worker.

    Raises ConfigError when there are fewer GPUs than one worker needs.
    """
    worst = max(demands, default=0)
    if worst and not gpus:
        raise ConfigError(
            "a pool asks for device cuda and no GPU is visible; take device cpu, or check the "
            f"driver and {VISIBLE_DEVICES}"
        )
    if worst > len(gpus):
        raise ConfigError(
            f"a worker with tp_size {worst} needs {worst} GPUs, and {len(gpus)} are visible; "
            f"lower tp_size or make more visible ({VISIBLE_DEVICES})"
        )
    assigned = []
    first = 0
    for demand in demands:
        # The ranks of one worker are never spread over both ends of the list.
        if first + demand > len(gpus):
            first = 0
        assigned.append(list(gpus[first : first + demand]))
        first += demand
    return assigned


def gpu_demand(config: EngineConfig) -> int:
    return config.tp_size if config.device is Device.CUDA else 0
