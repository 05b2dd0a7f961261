"""The system on a local Ray: `baton serve`.

Ray is started with what Serve needs and no more: no dashboard pages, no log or autoscaler monitor,
a small object store (tokens and KV never pass through it). Its token authentication stays on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from services.launch.autoscaling import Autoscaling
from services.launch.config import SystemConfig
from services.launch.run_directory import RunDirectory, new_secret

APPLICATION = "baton"
DEPLOY_TIMEOUT_S = 2400.0
"""Beyond what a large model takes to load; a replica that fails ends the wait at once."""
POLL_S = 0.2
OBJECT_STORE_BYTES = 80 << 20
BASE_ENVIRONMENT = {
    # Without this the dashboard agent reports usage to its makers.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # A killed proxy is noticed in seconds instead of half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
}
HAPROXY_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
}


class RaySystem:
    """A running Serve application; Ray restarts its parts by itself."""

    def poll(self) -> None:
        """Nothing is due: Serve's controller does the work."""

    def hopeless(self) -> str | None:
        """Serve reports a failed start from `serve.run` already."""
        return None

    def ready(self) -> None:
        """Nothing waits for it."""

    def stop(self, *, grace_s: float) -> None:
        """Let the replicas drain for at most `grace_s`, then end Ray."""
        import ray

        if grace_s > 0 and ray.is_initialized():
            # On a thread of its own, because the call itself has no time-out.
            draining = threading.Thread(target=_delete_application, daemon=True)
            draining.start()
            draining.join(grace_s)
        ray.shutdown()


def _delete_application() -> None:
    """Drains the replicas. The controller ends with Ray; serve.shutdown() would kill it first and
    make Ray complain on the terminal."""
    from ray import serve

    with contextlib.suppress(Exception):
        serve.delete(APPLICATION)


def start_system(
    system: SystemConfig,
    run: RunDirectory,
    *,
    use_haproxy: bool,
    autoscaling: Autoscaling | None = None,
) -> RaySystem:
    """Start Ray and deploy the application; returns when Serve calls all replicas running.

    Raises Unavailable with Serve's reason when a replica does not come up.
    """
    os.environ.update(BASE_ENVIRONMENT)
    if use_haproxy:
        os.environ.update(HAPROXY_ENVIRONMENT)
    # Ray reads its environment when it is imported.
    import ray
    from ray import serve

    from baton.core.errors import Unavailable
    from services.launch.graph import build_graph

    # Above the notes on its start that Ray prints as warnings; failures arrive as exceptions.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    running = RaySystem()
    try:
        with _without_monitors():
            ray.init(
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                num_cpus=max(2, os.cpu_count() or 2),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        serve.start(
            http_options={
                "host": system.host,
                "port": system.http_port,
                "request_timeout_s": None,
                **_tls_options(system),
            },
            logging_config={"log_level": "ERROR"},
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if autoscaling is None:
            serve.run(build_graph(system, run, new_secret()), name=APPLICATION, route_prefix="/")
        else:
            _deploy(system, run, autoscaling)
    except RuntimeError as error:
        running.stop(grace_s=0)
        raise Unavailable(f"Ray Serve could not start the system: {error}") from error
    except BaseException:
        running.stop(grace_s=0)
        raise
    return running


def _deploy(system: SystemConfig, run: RunDirectory, autoscaling: Autoscaling) -> None:
    """Have Serve build and follow the application; returns when it runs.

    Raises Unavailable with Serve's reason when it does not come up. `serve.run` has no place for a
    policy of the whole application.
    """
    from ray import serve
    from ray.serve._private.api import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from baton.core.errors import Unavailable
    from services.launch.ray_autoscaling import policy, write_planner, write_system

    file = write_system(system, run, new_secret(), autoscaling)
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "services.launch.graph:build_from_file",
        "args": {"file": str(file)},
        "autoscaling_policy": policy(write_planner(system, run, autoscaling)),
        "logging_config": {"log_level": "ERROR"},
    }
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    _get_global_client().deploy_apps(schema)
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    while time.monotonic() < deadline:
        found = serve.status().applications.get(APPLICATION)
        status = "NOT_STARTED" if found is None else found.status
        if status == "RUNNING":
            return
        if found is not None and status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [d.message for d in found.deployments.values() if d.message]
            raise Unavailable(f"Ray Serve could not start the system: {found.message} {reasons}")
        time.sleep(POLL_S)
    raise Unavailable(f"Ray Serve has not started the system within {DEPLOY_TIMEOUT_S:g} s")


def _tls_options(system: SystemConfig) -> dict[str, str]:
    """Serve reads the files once, at its start."""
    tls = system.door_tls
    if not tls.is_on:
        return {}
    return {"ssl_certfile": str(tls.cert_file), "ssl_keyfile": str(tls.key_file)}


@contextlib.contextmanager
def _without_monitors() -> Iterator[None]:
    """`ray start` has options for these two processes, `ray.init` has none (Ray 2.60)."""
    import ray._private.parameter as parameter

    original = parameter.RayParams.__init__

    def trimmed(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "no_monitor": True, "include_log_monitor": False})

    parameter.RayParams.__init__ = trimmed
    try:
        yield
    finally:
        parameter.RayParams.__init__ = original
