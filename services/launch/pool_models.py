"""How fast the workers of each pool are, for an autoscaler that is about to watch them: measured
figures from a profile, or a prediction from the limits of this machine.

Does not know: what is done with them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.engine.config import DEFAULT_CPU_KV_CACHE_BYTES, Device, EngineConfig
from baton.model_info.folder import read_shape
from baton.model_info.formulas import kv_bytes_per_token
from baton.model_info.machines import MACHINES, Machine, find_machine, measure
from baton.model_info.report import cost_model
from services.launch.autoscale_config import LiveConfig
from services.launch.config import SystemConfig
from services.launch.pools import engine_config
from services.planner.pool_model import Efficiency, PoolModel, predict
from services.planner.profile_file import read_profile

MEASURE_TIMEOUT_S = 120.0
HOST_LINK_BYTES_PER_S = 4e9
"""Through shared memory, one copy."""
CPU_EFFICIENCY = Efficiency(step_s=0.003)
"""Between the kernels of a step lies the interpreter."""
_GPU_FILES = Path("/proc/driver/nvidia/gpus")


def pool_models(
    system: SystemConfig,
    live: LiveConfig,
    *,
    measure_host: Callable[[str], Machine] | None = None,
    gpu_files: Path = _GPU_FILES,
) -> dict[Role, PoolModel]:
    """Of prefill and decode workers. Without a profile a CPU is measured, which takes about ten
    seconds. Raises ConfigError for a size that the profile lacks, and for an unknown GPU."""
    models: dict[Role, PoolModel] = {}
    machines: dict[tuple[Device, str], Machine] = {}
    for role in system.roles:
        config = engine_config(system, role)
        if live.profile is not None:
            model = _of_profile(live.profile, role, config.tp_size)
        else:
            key = (config.device, config.dtype)
            if key not in machines:
                machines[key] = _machine(live, config, measure_host or _measure_apart, gpu_files)
            model = _predicted(config, machines[key])
        if live.start_s is not None:
            model = dataclasses.replace(model, start_s=live.start_s)
        models[role] = model
    return models


def _of_profile(file: Path, role: Role, size: int) -> PoolModel:
    profile = read_profile(file)
    sizes = profile.prefill if role is Role.PREFILL else profile.decode
    if size not in sizes:
        known = ", ".join(map(str, sorted(sizes))) or "none"
        raise ConfigError(
            f"autoscale.profile {file} has no {role.value} worker of tensor_parallel {size} "
            f"(there: {known}); measure one with `baton profile`"
        )
    return sizes[size]


def _machine(
    live: LiveConfig,
    config: EngineConfig,
    measure_host: Callable[[str], Machine],
    gpu_files: Path,
) -> Machine:
    if live.machine is not None:
        return find_machine(live.machine)
    if config.device is Device.CPU:
        return measure_host(config.dtype)
    model = _gpu_model(gpu_files)
    for machine in MACHINES:
        if machine.name.upper() in model.upper().split():
            return machine
    raise ConfigError(
        f"nothing is known of GPU {model!r}; give figures of `baton profile` by --set "
        "autoscale.profile=FILE, or a machine like it by --set autoscale.machine=NAME"
    )


def _gpu_model(gpu_files: Path) -> str:
    """As the driver calls the first GPU, for example NVIDIA H200."""
    for file in sorted(gpu_files.glob("*/information")):
        for line in file.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "Model":
                return value.strip().replace("-", " ")
    return "of an unknown name"


def _predicted(config: EngineConfig, machine: Machine) -> PoolModel:
    model = cost_model(read_shape(config.model_path), config.dtype)
    if config.device is not Device.CPU:
        return predict(model, machine, config.tp_size, dtype=config.dtype)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = dataclasses.replace(
        machine, memory_bytes=float(memory), link_bytes_per_s=HOST_LINK_BYTES_PER_S
    )
    predicted = predict(
        model, machine, config.tp_size, dtype=config.dtype, efficiency=CPU_EFFICIENCY
    )
    room = config.kv_cache_bytes or DEFAULT_CPU_KV_CACHE_BYTES
    return dataclasses.replace(predicted, max_kv_tokens=max(1, room // kv_bytes_per_token(model)))


def _measure_apart(dtype: str) -> Machine:
    """In a process of its own: what measuring needs of memory is gone afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, dtype).result(MEASURE_TIMEOUT_S)
        except TimeoutError:
            raise ConfigError(
                f"this machine's limits could not be measured within {MEASURE_TIMEOUT_S:g} s; give "
                "figures of `baton profile` by --set autoscale.profile=FILE"
            ) from None
