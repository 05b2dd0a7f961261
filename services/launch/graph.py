"""The Ray Serve application: one router deployment over one deployment per pool.

Where the pools follow the load, Serve has to build the application itself, since only then it takes
a policy for all of its deployments: from a file in the run directory (`build_from_file`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray import serve

from baton.core.config import build, merge
from baton.core.worker_info import Role
from services.decode.deployment import DecodeDeployment
from services.launch.autoscale_config import LiveConfig, SystemAutoscale
from services.launch.config import LOCAL_DRAIN_S, SystemConfig, router_values, worker_values
from services.launch.pools import engine_config, gpu_demand
from services.launch.ray_autoscaling import followed_options, told_options
from services.launch.run_directory import RunDirectory
from services.planner.autoscale_config import AutoscaleConfig
from services.prefill.deployment import PrefillDeployment
from services.router.deployment import RouterDeployment
from services.worker.deployment import SERVE_OPTIONS

STOP_MARGIN_S = 2.0
"""Beyond the drain: for the engine thread and the transport to end."""
POOLS = {Role.PREFILL: PrefillDeployment, Role.DECODE: DecodeDeployment}


def build_graph(
    system: SystemConfig,
    run: RunDirectory,
    cluster_secret: str,
    autoscale: SystemAutoscale | None = None,
) -> serve.Application:
    """The application of `system`, to be given to `serve.run`. With `autoscale` Serve decides
    between its limits how many replicas the pools have."""
    handles = [_bind_pool(system, run, role, cluster_secret, autoscale) for role in system.roles]
    options: dict[str, Any] = {"num_replicas": system.num_routers}
    if autoscale is not None:
        options = told_options(system.num_routers)
    router = RouterDeployment.options(**options, graceful_shutdown_timeout_s=LOCAL_DRAIN_S)
    values = router_values(system, targets_dir=run.targets, use_ray=True)
    return router.bind(values, str(run.path / "logs"), *handles)


def build_from_file(args: Mapping[str, Any]) -> serve.Application:
    """`args`: file, as written by `ray_autoscaling.write_system`."""
    values = yaml.safe_load(Path(args["file"]).read_text())
    system = build(SystemConfig, values["system"])
    autoscale = SystemAutoscale(
        build(AutoscaleConfig, values["targets"]), build(LiveConfig, values["live"])
    )
    run = RunDirectory(Path(values["run"]))
    return build_graph(system, run, values["cluster_secret"], autoscale)


def _bind_pool(
    system: SystemConfig,
    run: RunDirectory,
    role: Role,
    cluster_secret: str,
    autoscale: SystemAutoscale | None,
) -> serve.Application:
    count = system.num_prefill if role is Role.PREFILL else system.num_decode
    values: dict[str, Any] = merge(
        worker_values(system, role, 0),
        {
            "transfer": {"cluster_secret": cluster_secret},
            "registry": {"directory": str(run.registry)},
        },
    )
    options: dict[str, Any] = {"num_replicas": count}
    if autoscale is not None:
        targets = autoscale.targets
        limits = targets.prefill if role is Role.PREFILL else targets.decode
        options = followed_options(limits, count)
        # A replica that goes lets its requests move and finish; Ctrl-C does not wait for that.
        values["drain_s"] = autoscale.live.drain_s
    # Replicas of one deployment get the same settings; each makes up its own worker id.
    del values["worker_id"]
    # Nobody reads them to start anything; `baton doctor` does, to find its way in.
    run.write_settings(role.value, values)
    deployment = POOLS[role].options(
        **options,
        graceful_shutdown_timeout_s=values["drain_s"] + STOP_MARGIN_S,
        ray_actor_options={
            **SERVE_OPTIONS["ray_actor_options"],
            # Ray makes as many visible to the replica, and none when it is told of none.
            "num_gpus": gpu_demand(engine_config(system, role)),
        },
    )
    return deployment.bind(values, str(run.path / "logs"))
