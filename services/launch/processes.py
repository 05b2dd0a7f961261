"""The system as plain subprocesses under a small supervisor: `baton serve --no-ray`.

Does not know: when more workers are wanted (`process_pools.py`), how children are watched
(`supervisor.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from baton.core.config import merge
from baton.core.errors import Unavailable
from baton.core.worker_info import Role
from services.launch.config import SystemConfig, router_values, worker_values
from services.launch.pools import (
    VISIBLE_DEVICES,
    assign_gpus,
    engine_config,
    gpu_demand,
    visible_gpus,
    worker_demands,
)
from services.launch.run_directory import RunDirectory
from services.launch.supervisor import Child, Supervisor


def start_system(system: SystemConfig, run: RunDirectory) -> Supervisor:
    """Start all processes of `system`; returns at once.

    The workers' cluster secret is the one their registry keeps for them.
    """
    supervisor = Supervisor()
    launcher = WorkerLauncher(system, run, os.environ)
    for (role, index), environment in worker_environments(system, os.environ).items():
        supervisor.start(launcher.child(role, index, environment))
    for index in range(system.num_routers):
        values = router_values(system, index=index, targets_dir=run.targets)
        if system.redis_url is None:
            values["registry_dir"] = str(run.registry)
        name = "router" if system.num_routers == 1 else f"router-{index}"
        command = _command(run, name, "services.router", values)
        supervisor.start(Child(name, command, run.log_file(name), is_front=True))
    return supervisor


@dataclass(frozen=True, slots=True)
class WorkerLauncher:
    """Makes children that are workers of `system`."""

    system: SystemConfig
    run: RunDirectory
    environ: Mapping[str, str]

    def child(self, role: Role, index: int, environment: Mapping[str, str]) -> Child:
        """Not started yet. `environment`: its GPUs."""
        name = worker_name(role, index)
        command = self.command(role, name)
        return Child(name, command, self.run.log_file(name), environment=environment)

    def command(self, role: Role, name: str) -> list[str]:
        """Of a worker that is to have this role and name; writes its settings."""
        values = merge(
            worker_values(self.system, role, 0),
            {"registry": {"directory": str(self.run.registry)}, "worker_id": name},
        )
        return _command(self.run, name, f"services.{role.value}", values)

    def another(self, role: Role, children: Iterable[Child]) -> Child:
        """One more worker beside `children`, at the lowest index that is free, on GPUs that none
        of them has. Raises Unavailable when there are too few."""
        present = list(children)
        environment = self._free_gpus(role, present)
        taken = {child.name for child in present}
        index = next(i for i in range(len(present) + 1) if worker_name(role, i) not in taken)
        return self.child(role, index, environment)

    def _free_gpus(self, role: Role, present: list[Child]) -> dict[str, str]:
        demand = gpu_demand(engine_config(self.system, role))
        if not demand:
            return {}
        gpus = visible_gpus(self.environ)
        used = {
            gpu
            for child in present
            for gpu in child.environment.get(VISIBLE_DEVICES, "").split(",")
        }
        free = [gpu for gpu in gpus if gpu not in used]
        if len(free) < demand:
            raise Unavailable(
                f"one more {role.value} worker needs {demand} GPUs, and {len(free)} of the "
                f"{len(gpus)} visible ones are free; lower autoscale.max_devices or make more "
                f"visible ({VISIBLE_DEVICES})"
            )
        return {VISIBLE_DEVICES: ",".join(free[:demand])}


def worker_name(role: Role, index: int) -> str:
    return f"{role.value}-{index}"


def worker_environments(
    system: SystemConfig, environ: Mapping[str, str]
) -> dict[tuple[Role, int], dict[str, str]]:
    """What each worker (role, index) gets beside our environment: the GPUs of its ranks."""
    demands = worker_demands(system)
    gpus = visible_gpus(environ) if any(demands.values()) else []
    assigned = assign_gpus(list(demands.values()), gpus)
    return {
        worker: {VISIBLE_DEVICES: ",".join(own)} if own else {}
        for worker, own in zip(demands, assigned, strict=True)
    }


def _command(run: RunDirectory, name: str, module: str, values: Mapping[str, object]) -> list[str]:
    settings = run.write_settings(name, values)
    return [
        *(sys.executable, "-m", module),
        *("--config", str(settings)),
        *("--exit-with-parent", str(os.getpid())),
    ]
