"""The Ray Serve application: one router deployment over one deployment per pool."""

from __future__ import annotations

from typing import Any

from ray import serve

from baton.core.config import merge
from baton.core.worker_info import Role
from services.decode.deployment import DecodeDeployment
from services.launch.config import LOCAL_DRAIN_S, SystemConfig, router_values, worker_values
from services.launch.pools import engine_config, gpu_demand
from services.launch.run_directory import RunDirectory
from services.prefill.deployment import PrefillDeployment
from services.router.deployment import RouterDeployment
from services.worker.deployment import SERVE_OPTIONS

STOP_MARGIN_S = 2.0
"""Beyond the drain: for the engine thread and the transport to end."""
POOLS = {Role.PREFILL: PrefillDeployment, Role.DECODE: DecodeDeployment}


def build_graph(system: SystemConfig, run: RunDirectory, cluster_secret: str) -> serve.Application:
    """The application of `system`, to be given to `serve.run`."""
    handles = [_bind_pool(system, run, role, cluster_secret) for role in system.roles]
    router = RouterDeployment.options(
        num_replicas=system.num_routers, graceful_shutdown_timeout_s=LOCAL_DRAIN_S
    )
    values = router_values(system, targets_dir=run.targets, use_ray=True)
    return router.bind(values, str(run.path / "logs"), *handles)


def _bind_pool(
    system: SystemConfig, run: RunDirectory, role: Role, cluster_secret: str
) -> serve.Application:
    count = system.num_prefill if role is Role.PREFILL else system.num_decode
    values: dict[str, Any] = merge(
        worker_values(system, role, 0),
        {
            "transfer": {"cluster_secret": cluster_secret},
            "registry": {"directory": str(run.registry)},
        },
    )
    # Replicas of one deployment get the same settings; each makes up its own worker id.
    del values["worker_id"]
    # Nobody reads them to start anything; `baton doctor` does, to find its way in.
    run.write_settings(role.value, values)
    deployment = POOLS[role].options(
        num_replicas=count,
        graceful_shutdown_timeout_s=values["drain_s"] + STOP_MARGIN_S,
        ray_actor_options={
            **SERVE_OPTIONS["ray_actor_options"],
            # Ray makes as many visible to the replica, and none when it is told of none.
            "num_gpus": gpu_demand(engine_config(system, role)),
        },
    )
    return deployment.bind(values, str(run.path / "logs"))
