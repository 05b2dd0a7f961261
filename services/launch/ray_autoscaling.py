"""Autoscaling of an application of Ray Serve: options of its deployments, and its own files.

The application's policy (`services/planner/ray_policy.py`) says how many replicas the pools are to
have, once an interval; Serve's own delays would only come on top of what it has thought through.
Serve asks the policy about deployments with autoscaling options alone, so the router has some too,
with one number as both limits: what its replicas tell is what the policy sees.

Does not know: processes, how anything is decided.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baton.core.worker_info import Role
from baton.model_info.folder import read_shape
from baton.model_info.formulas import kv_bytes_per_token
from baton.model_info.report import cost_model
from services.launch.autoscaling import LOOPBACK, Autoscaling, decision_file
from services.launch.config import SystemConfig
from services.launch.pools import engine_config
from services.launch.run_directory import RunDirectory
from services.planner.autoscale_config import PoolLimits
from services.planner.plain import to_plain
from services.planner.profile_file import profile_json
from services.router.deployment import SERVE_OPTIONS as ROUTER_OPTIONS

POLICY = "services.planner.ray_policy:SloPolicy"
LOOK_BACK_S = 12.0
"""Above the 10 s that Serve takes for its own statistics."""
_ENVIRONMENT = {
    # Replicas note their statistics every 1.2 s, and tell the controller every second.
    "RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


def followed_options(limits: PoolLimits, initial: int) -> dict[str, Any]:
    """Of a pool that is to have as many replicas as the policy says."""
    return {
        "autoscaling_config": {
            "min_replicas": limits.min_workers,
            "max_replicas": limits.max_workers,
            "initial_replicas": initial,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
        }
    }


def told_options(num_replicas: int, actor_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a router, whose number is fixed and whose statistics the policy sees."""
    options = {**ROUTER_OPTIONS["ray_actor_options"], **(actor_options or {})}
    runtime = options.get("runtime_env", {})
    variables = {**runtime.get("env_vars", {}), **_ENVIRONMENT}
    return {
        **followed_options(PoolLimits(num_replicas, num_replicas), num_replicas),
        "ray_actor_options": {**options, "runtime_env": {**runtime, "env_vars": variables}},
    }


def policy(settings: Path) -> dict[str, Any]:
    """For `autoscaling_policy` of the application. `settings`: those of a planner."""
    return {"policy_function": POLICY, "policy_kwargs": {"settings": str(settings)}}


def write_planner(system: SystemConfig, run: RunDirectory, autoscaling: Autoscaling) -> Path:
    """The planner's settings, and beside them the figures of workers."""
    config = engine_config(system, Role.PREFILL)
    shape = read_shape(config.model_path)
    models = autoscaling.models
    profile = run.path / "profile.json"
    profile.write_text(
        json.dumps(
            profile_json(
                models.prefill,
                models.decode,
                kv_bytes_per_token=kv_bytes_per_token(cost_model(shape, config.dtype)),
                source=models.prefill.source,
            )
        )
    )
    return run.write_settings(
        "planner",
        {
            "autoscale": to_plain(autoscaling.settings.targets),
            "models": {
                "profile": str(profile),
                "prefill_tensor_parallel": models.prefill.tensor_parallel,
                "decode_tensor_parallel": models.decode.tensor_parallel,
            },
            "decisions": {"path": str(decision_file(run))},
            "stats": {"targets_dir": str(run.targets)},
            "interval_s": autoscaling.settings.live.interval_s,
            "host": LOOPBACK,
            "port": 0,
        },
    )


def write_system(
    system: SystemConfig, run: RunDirectory, cluster_secret: str, autoscaling: Autoscaling
) -> Path:
    """All that `graph.build_from_file` needs; holds secrets, as the settings of processes do."""
    settings = autoscaling.settings
    values = {
        "system": to_plain(system),
        "targets": to_plain(settings.targets),
        "live": to_plain(settings.live),
        "run": str(run.path),
        "cluster_secret": cluster_secret,
    }
    return run.write_settings("system", values)
