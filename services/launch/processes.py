"""The system as plain subprocesses under a small supervisor: `baton serve --no-ray`.

    spawn ── exits ──► wait (backoff, doubling up to a limit) ──► spawn ...
      └── stop(): SIGTERM to all, then SIGKILL to what is left after the grace period

Children run in sessions of their own, so a Ctrl-C on the terminal reaches only the supervisor,
and die with it if it is killed (`--exit-with-parent`).
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from baton.core.config import ENV_PREFIX, merge
from baton.core.worker_info import Role
from baton.process import EXIT_CONFIG
from services.launch.config import SystemConfig, router_values, worker_values
from services.launch.pools import VISIBLE_DEVICES, assign_gpus, visible_gpus, worker_demands
from services.launch.run_directory import RunDirectory

logger = logging.getLogger(__name__)

RESTART_BACKOFF_S = 0.5
RESTART_BACKOFF_MAX_S = 10.0
STABLE_AFTER_S = 30.0
"""A child that ran this long starts again without delay when it dies."""
FRONT_GRACE_S = 3.0
"""Of the time to stop, what the router may take before the workers are told."""
MAX_EARLY_EXITS = 3
"""A child that dies this often before the system was ever ready will not get better."""


@dataclass(slots=True)
class Child:
    """One supervised process."""

    name: str
    command: Sequence[str]
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    started_at_s: float = 0.0
    backoff_s: float = RESTART_BACKOFF_S
    restart_at_s: float = 0.0
    num_exits: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside what it inherits."""
    is_front: bool = False
    """Clients talk to it; it ends before the others."""
    is_misconfigured: bool = False
    """It said itself that starting it again will not help."""


@dataclass(slots=True)
class Supervisor:
    """Starts children, restarts those that exit, stops all. One thread calls `poll` in turns."""

    children: list[Child] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_stopping: bool = False

    def start(self, child: Child) -> None:
        self.children.append(child)
        self._spawn(child)

    def poll(self) -> None:
        """Restart what has exited and waited long enough."""
        with self._lock:
            if self._is_stopping:
                return
            now_s = time.monotonic()
            for child in self.children:
                self._poll_child(child, now_s)

    def hopeless(self) -> str | None:
        """Why the system will not come up: a child that keeps dying, with the end of its log."""
        for child in self.children:
            if child.is_misconfigured or child.num_exits >= MAX_EARLY_EXITS:
                tail = "\n".join(child.log_file.read_text().splitlines()[-15:])
                times = "once" if child.num_exits == 1 else f"{child.num_exits} times"
                return f"{child.name} exited {times}; the end of its log:\n{tail}"
        return None

    def stop(self, *, grace_s: float) -> None:
        """End all children, the routers first: no request meets half a system."""
        with self._lock:
            self._is_stopping = True
        deadline = time.monotonic() + grace_s
        front = min(deadline, time.monotonic() + FRONT_GRACE_S)
        _end([child for child in self.children if child.is_front], front)
        _end([child for child in self.children if not child.is_front], deadline)

    def _poll_child(self, child: Child, now_s: float) -> None:
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                return
            child.process = None
            child.num_exits += 1
            child.is_misconfigured = code == EXIT_CONFIG
            if now_s - child.started_at_s >= STABLE_AFTER_S:
                child.backoff_s = RESTART_BACKOFF_S
            child.restart_at_s = now_s + child.backoff_s
            logger.warning(
                "%s exited with code %s; restarting in %.1f s", child.name, code, child.backoff_s
            )
            child.backoff_s = min(child.backoff_s * 2, RESTART_BACKOFF_MAX_S)
        elif now_s >= child.restart_at_s:
            self._spawn(child)

    def _spawn(self, child: Child) -> None:
        log: IO[bytes]
        with child.log_file.open("ab") as log:
            child.process = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**_inherited_environment(), **child.environment},
            )
        child.started_at_s = time.monotonic()


def _end(children: Sequence[Child], deadline: float) -> None:
    """SIGTERM, and SIGKILL to what is left at `deadline` (monotonic)."""
    living = [c.process for c in children if c.process and c.process.poll() is None]
    for process in living:
        process.send_signal(signal.SIGTERM)
    for process in living:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _inherited_environment() -> dict[str, str]:
    """Ours without settings: those are in each child's file already, ranked as documented."""
    return {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}


def start_system(system: SystemConfig, run: RunDirectory) -> Supervisor:
    """Start all processes of `system`; returns at once.

    The workers' cluster secret is the one their registry keeps for them.
    """
    supervisor = Supervisor()
    environments = worker_environments(system, os.environ)
    for (role, index), environment in environments.items():
        values = worker_values(system, role, index)
        values = merge(values, {"registry": {"directory": str(run.registry)}})
        name = f"{role.value}-{index}"
        _start(supervisor, run, name, f"services.{role.value}", values, environment)
    for index in range(system.num_routers):
        values = router_values(system, index=index, targets_dir=run.targets)
        if system.redis_url is None:
            values["registry_dir"] = str(run.registry)
        name = "router" if system.num_routers == 1 else f"router-{index}"
        _start(supervisor, run, name, "services.router", values, is_front=True)
    return supervisor


def _start(
    supervisor: Supervisor,
    run: RunDirectory,
    name: str,
    module: str,
    values: dict[str, object],
    environment: Mapping[str, str] | None = None,
    *,
    is_front: bool = False,
) -> None:
    settings = run.write_settings(name, values)
    command = [
        *(sys.executable, "-m", module),
        *("--config", str(settings)),
        *("--exit-with-parent", str(os.getpid())),
    ]
    supervisor.start(
        Child(
            name=name,
            command=command,
            log_file=run.log_file(name),
            environment=environment or {},
            is_front=is_front,
        )
    )


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
