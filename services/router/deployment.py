"""The router inside a Ray Serve replica: Serve's front door carries HTTP, gRPC is our own.

Serve hands HTTP requests to the ASGI application; workers come from the replicas' metadata. All
else is what `python -m services.router` runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from baton.settings import start_logging
from services.router.collection import keep_from_collection
from services.router.config import load_router_config
from services.router.core import RouterCore
from services.router.edge.door_tls import open_door_tls, refuse_client_ca
from services.router.edge.http_app import HttpApp
from services.router.edge.own_door import OwnDoor
from services.router.fronts import open_grpc_server, open_http_app
from services.router.workers.ray_membership import watch_replicas

# The event loop of the replica runs our code itself: half the CPU of a token on the router.
_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


SERVE_OPTIONS: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": _ENVIRONMENT}},
    # Serve's default of 5 would queue requests that the dispatcher could place.
    "max_ongoing_requests": 4096,
    "health_check_period_s": 1.0,
    "health_check_timeout_s": 5.0,
    "graceful_shutdown_wait_loop_s": 0.1,
    # Serve lets running streams go on for this long before it stops the replica.
    "graceful_shutdown_timeout_s": 20.0,
}


class RouterReplica:
    """One router a replica. `pools` are handles to the worker deployments."""

    async def __init__(  # type: ignore[misc]
        self, values: Mapping[str, Any], log_dir: str, *pools: DeploymentHandle
    ) -> None:
        config = load_router_config(overrides=values)
        start_logging("router", config.log, Path(log_dir) / "router.log")
        refuse_client_ca(config.edge.tls)
        self._core = RouterCore.from_config(config, membership=watch_replicas(pools))
        self._http = open_http_app(self._core, config)
        tls = open_door_tls(config.edge.tls, self._core.metrics)
        self._grpc = open_grpc_server(self._core, config, tls)
        # Replicas have the same settings and need files of their own.
        name = f"{config.copy.name}-{serve.get_replica_context().replica_id.unique_id}"
        copy = dataclasses.replace(config.copy, name=name)
        self._own = OwnDoor(self._http, dataclasses.replace(config, copy=copy))
        self._core.start()
        await self._own.start()
        await self._grpc.start()
        keep_from_collection()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve asks every replica for it, and gives it to the autoscaling policy."""
        return self._core.pool_stats().to_numbers()

    def __serve_build_asgi_app__(self) -> HttpApp:
        return self._http

    async def __del__(self) -> None:
        self._http.end_all()
        await self._grpc.stop()
        await self._core.stop()
        await self._own.stop()
        self._http.close()


RouterDeployment = serve.deployment(name="Router", **SERVE_OPTIONS)(serve.ingress()(RouterReplica))
