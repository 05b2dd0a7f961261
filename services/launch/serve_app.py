"""The Ray Serve application of a cluster, built from settings files that every node has.

    serve config:  import_path: services.launch.serve_app:build_app
                   args: {settings_dir: /etc/baton, num_prefill: 2, num_decode: 2, num_routers: 2}

Each replica reads `<kind>.yaml` of that folder and the environment of its own container, so secrets
and addresses never pass through Ray. Where replicas may run says the cluster: its nodes offer the
resources below, one for each replica that they have room for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from baton.core.config import build
from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.settings import merge_layers
from services.decode.config import DEFAULTS as DECODE_DEFAULTS
from services.launch.pools import gpu_demand
from services.launch.ray_autoscaling import followed_options, told_options
from services.planner.autoscale_config import AutoscaleConfig
from services.planner.planner_config import load_models, load_planner_config
from services.prefill.config import DEFAULTS as PREFILL_DEFAULTS
from services.router.config import RouterConfig, load_router_config
from services.router.deployment import SERVE_OPTIONS as ROUTER_OPTIONS
from services.router.deployment import RouterReplica
from services.worker.config import WorkerConfig, load_worker_config
from services.worker.deployment import SERVE_OPTIONS as WORKER_OPTIONS
from services.worker.deployment import WorkerReplica

RESOURCE_PREFIX = "baton_"
"""A node that offers baton_prefill: 2 has room for two prefill workers."""
STOP_MARGIN_S = 5.0
MAX_REPLICAS = 10_000


@dataclass(frozen=True, slots=True)
class AppArgs:
    """What the serve config gives; the rest stands in the settings files."""

    settings_dir: Path
    num_prefill: int = 1
    num_decode: int = 1
    num_routers: int = 1
    planner: bool = False
    """The pools follow `autoscaling_policy` of the application, within the limits that planner.yaml
    has; numbers of workers are what they begin with."""
    log_dir: Path = Path("/tmp/baton/logs")

    def __post_init__(self) -> None:
        for name, least in (("num_prefill", 0), ("num_decode", 1), ("num_routers", 1)):
            value = getattr(self, name)
            if not least <= value <= MAX_REPLICAS:
                raise ConfigError(f"{name} must be between {least} and {MAX_REPLICAS}, got {value}")

    def file(self, kind: str) -> Path:
        return self.settings_dir / f"{kind}.yaml"


class _FromFile(WorkerReplica):
    async def __init__(self, settings: str, log_dir: str) -> None:  # type: ignore[misc]
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        values = merge_layers(WorkerConfig, file=Path(settings), environ=os.environ)
        await super().__init__(values, log_dir)


class PrefillFromFile(_FromFile):
    """One prefill worker a replica."""

    DEFAULTS = PREFILL_DEFAULTS


class DecodeFromFile(_FromFile):
    """One decode worker a replica."""

    DEFAULTS = DECODE_DEFAULTS


class RouterFromFile(RouterReplica):
    """One router a replica."""

    async def __init__(  # type: ignore[misc]
        self, settings: str, log_dir: str, *pools: DeploymentHandle
    ) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        values = merge_layers(RouterConfig, file=Path(settings), environ=os.environ)
        await super().__init__(values, log_dir, *pools)


PrefillPool = serve.deployment(name="Prefill", **WORKER_OPTIONS)(PrefillFromFile)
DecodePool = serve.deployment(name="Decode", **WORKER_OPTIONS)(DecodeFromFile)
RouterDeployment = serve.deployment(name="Router", **ROUTER_OPTIONS)(
    serve.ingress()(RouterFromFile)
)
_POOLS = {Role.PREFILL: PrefillPool, Role.DECODE: DecodePool}
_DEFAULTS = {Role.PREFILL: PREFILL_DEFAULTS, Role.DECODE: DECODE_DEFAULTS}


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application for `args`, as in AppArgs. Raises ConfigError, also for wrong settings: Ray
    then shows the reason as the application's status, and the one that runs goes on."""
    given = build(AppArgs, args)
    roles = (Role.PREFILL, Role.DECODE) if given.num_prefill else (Role.DECODE,)
    targets = _targets(given) if given.planner else None
    pools = [_bind_pool(given, role, targets) for role in roles]
    config = load_router_config(file=given.file("router"), environ=os.environ)
    actor_options = {
        **ROUTER_OPTIONS["ray_actor_options"],
        "resources": {f"{RESOURCE_PREFIX}router": 1},
    }
    options: dict[str, Any] = {
        "num_replicas": given.num_routers,
        "ray_actor_options": actor_options,
    }
    if targets is not None:
        options = told_options(given.num_routers, actor_options)
    router = RouterDeployment.options(
        max_replicas_per_node=1,
        graceful_shutdown_timeout_s=config.edge.stop_grace_s + STOP_MARGIN_S,
        **options,
    )
    return router.bind(str(given.file("router")), str(given.log_dir), *pools)


def _targets(args: AppArgs) -> AutoscaleConfig:
    """Checked as far as the policy would be, which can only hold what is."""
    config = load_planner_config(file=args.file("planner"))
    load_models(config.models)
    for role, num, limits in (
        (Role.PREFILL, args.num_prefill, config.autoscale.prefill),
        (Role.DECODE, args.num_decode, config.autoscale.decode),
    ):
        if not limits.min_workers <= num <= limits.max_workers or not num:
            raise ConfigError(
                f"num_{role.value} is {num}, and autoscale.{role.value} of {args.file('planner')} "
                f"allows {limits.min_workers} to {limits.max_workers} workers, one at least"
            )
    return config.autoscale


def _bind_pool(args: AppArgs, role: Role, targets: AutoscaleConfig | None) -> serve.Application:
    file = args.file(role.value)
    config = load_worker_config(
        defaults=_DEFAULTS[role], file=file, environ=_of_another_node(os.environ)
    )
    count = args.num_prefill if role is Role.PREFILL else args.num_decode
    options: dict[str, Any] = {"num_replicas": count}
    if targets is not None:
        limits = targets.prefill if role is Role.PREFILL else targets.decode
        options = followed_options(limits, count)
    pool = _POOLS[role].options(
        **options,
        graceful_shutdown_timeout_s=config.drain_s + STOP_MARGIN_S,
        ray_actor_options={
            **WORKER_OPTIONS["ray_actor_options"],
            "num_gpus": gpu_demand(config.engine),
            "resources": {f"{RESOURCE_PREFIX}{role.value}": 1},
        },
    )
    return pool.bind(str(file), str(args.log_dir))


def _of_another_node(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with an address, which only the nodes of workers have: their files listen on all
    interfaces, and that is refused without one."""
    return {"BATON_ADVERTISE_HOST": "127.0.0.1", **environ}
