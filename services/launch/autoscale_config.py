"""What `autoscale` of a system says, checked against the rest of the system before anything starts.

    autoscale:
      enabled: true            as --autoscale
      ttft_s: 0.5              what is kept, and all else of AutoscaleConfig
      itl_s: 0.05
      max_devices: 8
      profile: measured.json   how fast workers are, and all else of LiveConfig

Does not know: processes, replicas, how anything is decided.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.config import build, merge
from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.settings import check_positive
from services.launch.config import SystemConfig
from services.launch.pools import engine_config, gpu_demand, visible_gpus
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.router.admission.slo_config import SloConfig

MAX_INTERVAL_S = 3600.0


@dataclass(frozen=True, slots=True)
class LiveConfig:
    """What a live autoscaler needs beside what the pure one does."""

    enabled: bool = False
    profile: Path | None = None
    """Measured by `baton profile`. None: predicted from the limits of the machine."""
    machine: str | None = None
    """A name of `baton model info`, for predictions. None: this one, as far as it is known."""
    interval_s: float = 5.0
    """Between two decisions."""
    start_s: float | None = None
    """From the decision to a worker that takes requests. None: as the profile says, 60 s without
    one."""
    drain_s: float = 600.0
    """How long requests of a worker that is to go may take to move or finish; then they are ended.
    Above the longest generation, none is."""
    start_timeout_s: float = 1200.0
    """A new worker that is not ready after this is given up."""

    def __post_init__(self) -> None:
        check_positive("autoscale", self, "interval_s", "drain_s", "start_timeout_s")
        if self.interval_s > MAX_INTERVAL_S:
            raise ConfigError(
                f"autoscale.interval_s must be at most {MAX_INTERVAL_S:g}, got {self.interval_s:g}"
            )
        if self.start_s is not None and not self.start_s >= 0:
            raise ConfigError(f"autoscale.start_s must not be negative, got {self.start_s:g}")
        if self.profile is not None and not self.profile.is_file():
            raise ConfigError(
                f"autoscale.profile {self.profile} is no file; `baton profile` writes one, and "
                "without one steps are predicted from the machine's limits"
            )
        if self.profile is not None and self.machine is not None:
            raise ConfigError(
                "autoscale.profile and autoscale.machine are both set; a profile has been measured "
                "on its machine: leave one out"
            )


@dataclass(frozen=True, slots=True)
class SystemAutoscale:
    """Checked."""

    targets: AutoscaleConfig
    live: LiveConfig


def read_autoscale(
    system: SystemConfig, environ: Mapping[str, str], *, use_ray: bool
) -> SystemAutoscale | None:
    """None where it is not enabled. Raises ConfigError naming value, limit and fix."""
    live_values, target_values = _split(system.autoscale)
    live = build(LiveConfig, live_values, where="autoscale.")
    if not live.enabled:
        return None
    if not system.num_prefill:
        raise ConfigError(
            "autoscale needs a prefill and a decode pool, and num_prefill is 0; start with "
            "--prefill 1, or leave --autoscale out"
        )
    values = {**_targets(system), **target_values}
    values = _with_devices(system, values, environ)
    config = build(AutoscaleConfig, values, where="autoscale.")
    _check_fits(system, config)
    if config.can_change_roles:
        _check_roles(system, use_ray=use_ray)
    return SystemAutoscale(config, live)


def judged_by(system: SystemConfig, autoscale: SystemAutoscale | None) -> SystemConfig:
    """`system` with routers that judge requests by what the autoscaler plans for."""
    if autoscale is None:
        return system
    targets = {"ttft_s": autoscale.targets.ttft_s, "itl_s": autoscale.targets.itl_s}
    return dataclasses.replace(system, router=merge({"pool_stats": targets}, system.router))


def _split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    live = {field.name for field in dataclasses.fields(LiveConfig)}
    targets = {field.name for field in dataclasses.fields(AutoscaleConfig)}
    if unknown := sorted(set(values) - live - targets):
        raise ConfigError(
            f"unknown setting autoscale.{unknown[0]}; known here: "
            f"{', '.join(sorted(live | targets))}"
        )
    return (
        {name: value for name, value in values.items() if name in live},
        {name: value for name, value in values.items() if name in targets},
    )


def _targets(system: SystemConfig) -> dict[str, Any]:
    """Those of the class that requests have which name none, where `autoscale` has none."""
    given = system.autoscale
    missing = [name for name in ("ttft_s", "itl_s") if name not in given]
    if not missing:
        return {}
    slo = build(SloConfig, system.router.get("slo", {}), where="router.slo.")
    default = slo.classes[slo.default_class]
    found = {name: getattr(default, name) for name in missing}
    for name, value in found.items():
        if value is None:
            raise ConfigError(
                f"autoscale.{name} is not set, and class {slo.default_class!r}, which requests "
                f"have that name none, has no target either; say what is to be kept, for example "
                f"--set autoscale.{name}={1.0 if name == 'ttft_s' else 0.1}"
            )
    return found


def _with_devices(
    system: SystemConfig, values: dict[str, Any], environ: Mapping[str, str]
) -> dict[str, Any]:
    """A worker takes as many devices as it has ranks; a CPU worker counts as one. All devices of
    this machine, unless `values` say how many."""
    demands = {role: gpu_demand(engine_config(system, role)) for role in system.roles}
    for role, demand in demands.items():
        pool = values.get(role.value, {})
        if not isinstance(pool, Mapping):
            raise ConfigError(f"autoscale.{role.value} is a section of settings, got {pool!r}")
        each = max(1, demand)
        given = pool.get("devices_per_worker", each)
        if str(given) != str(each):
            raise ConfigError(
                f"autoscale.{role.value}.devices_per_worker is {given}, and a worker of this pool "
                f"takes {each}; leave it out"
            )
        pool = {**pool, "devices_per_worker": each}
        _check_limits(role, pool)
        values = {**values, role.value: pool}
    if any(demands.values()):
        num_gpus = len(visible_gpus(environ))
        limit = values.setdefault("max_devices", num_gpus)
        if _is_above(limit, num_gpus):
            raise ConfigError(
                f"autoscale.max_devices is {limit}, and {num_gpus} GPUs are visible; lower it or "
                "leave it out"
            )
    else:
        values.setdefault("max_devices", max(2, len(os.sched_getaffinity(0))))
    return values


def _check_limits(role: Role, pool: Mapping[str, Any]) -> None:
    """They do not know of which pool they are."""
    where = f"autoscale.{role.value}."
    try:
        build(PoolLimits, pool, where=where)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if where in text else f"{where}{text}") from None


def _is_above(value: Any, limit: int) -> bool:
    """False for what is no number, which the settings refuse by themselves."""
    try:
        return int(value) > limit
    except (TypeError, ValueError):
        return False


def _check_fits(system: SystemConfig, config: AutoscaleConfig) -> None:
    """The pools as they start are pools that the autoscaler may have."""
    num_devices = 0
    for role, num, limits in (
        (Role.PREFILL, system.num_prefill, config.prefill),
        (Role.DECODE, system.num_decode, config.decode),
    ):
        where = f"autoscale.{role.value}"
        if limits.min_workers < 1:
            raise ConfigError(
                f"{where}.min_workers is {limits.min_workers}: a pool without workers serves "
                "nobody until one has started; take at least 1"
            )
        if not limits.min_workers <= num <= limits.max_workers:
            raise ConfigError(
                f"num_{role.value} is {num}, and {where} allows {limits.min_workers} to "
                f"{limits.max_workers} workers; start with --{role.value} "
                f"{min(max(num, limits.min_workers), limits.max_workers)} or change the limits"
            )
        num_devices += num * limits.devices_per_worker
    if num_devices > config.max_devices:
        raise ConfigError(
            f"{system.num_prefill} prefill and {system.num_decode} decode workers take "
            f"{num_devices} devices, and autoscale.max_devices is {config.max_devices}; raise it "
            "or start with fewer workers"
        )


def _check_roles(system: SystemConfig, *, use_ray: bool) -> None:
    if use_ray:
        raise ConfigError(
            "autoscale.can_change_roles: a replica of Ray Serve belongs to its deployment; start "
            "with --no-ray, or leave it out"
        )
    sizes = {role: engine_config(system, role).tp_size for role in system.roles}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"autoscale.can_change_roles: prefill workers have {sizes[Role.PREFILL]} ranks and "
            f"decode workers {sizes[Role.DECODE]}, so none can take the other's place; make "
            "tp_size equal, or leave it out"
        )
