"""A system of plain processes that follows its load: the supervisor, and a planner beside it.

    main thread      poll(): spawn, restart, forget children
    planner thread   every interval: observe ─► decide ─► start, drain, change a role
    job thread       what that takes: draining, changing a role

Does not know: how is decided.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from baton.core.clock import MonotonicClock, WallClock
from baton.core.config import build
from baton.core.tls import TlsConfig, open_tls
from baton.core.worker_info import Role
from baton.registry.directory import DirectoryRegistry
from baton.rpc.role_change import change_role
from services.launch.autoscale_config import LiveConfig, SystemAutoscale
from services.launch.background import BackgroundLoop
from services.launch.config import LOCAL_DRAIN_S, SystemConfig, router_values
from services.launch.planner_thread import PlannerThread
from services.launch.pool_models import pool_models
from services.launch.process_pools import END_MARGIN_S, PoolTimes, ProcessPools
from services.launch.processes import WorkerLauncher
from services.launch.run_directory import RunDirectory
from services.launch.supervisor import Supervisor
from services.planner.autoscale_config import PoolLimits
from services.planner.decision_log import DecisionLog, DecisionLogConfig
from services.planner.decision_record import Models
from services.planner.http_stats import HttpStats, StatsConfig
from services.planner.loop import PlannerLoop
from services.planner.metrics_port import MetricsPort
from services.planner.planner import Planner
from services.planner.planner_gauges import PlannerGauges
from services.planner.reachable import out_of_reach
from services.router.edge.scrape_target import reachable_host

LOOPBACK = "127.0.0.1"
ROLE_CHANGE_S = 60.0
"""For the requests of a worker that goes over; it stays what it was when they take longer."""
STOP_S = 2.0
"""For a step at work to end; what it was about to do is of no interest any more."""


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """All that is known before anything starts."""

    settings: SystemAutoscale
    models: Models

    def text(self, run: RunDirectory) -> str:
        """For the terminal, once it serves."""
        targets, models = self.settings.targets, self.models
        sources = dict.fromkeys((models.prefill.source, models.decode.source))
        warnings = "".join(f"warning: {text}\n" for text in out_of_reach(targets, models))
        return (
            f"{warnings}"
            f"autoscaling: {_limits(targets.prefill)} prefill and {_limits(targets.decode)} decode "
            f"workers on {targets.max_devices} devices, TTFT {targets.ttft_s:g} s and ITL "
            f"{targets.itl_s:g} s for {100 * targets.share:g} % of requests\n"
            f"figures of workers: {', '.join(sources)}\n"
            f"decisions: baton plan --explain {decision_file(run)}\n"
            f"its metrics, for Prometheus (file_sd_configs): {run.targets}/*.json"
        )


def prepare(system: SystemConfig, settings: SystemAutoscale) -> Autoscaling:
    """Raises ConfigError for a profile that does not fit."""
    models = pool_models(system, settings.live)
    return Autoscaling(settings, Models(models[Role.PREFILL], models[Role.DECODE]))


def decision_file(run: RunDirectory) -> Path:
    return run.path / "decisions.jsonl"


@dataclass(frozen=True, slots=True)
class AutoscaledSystem:
    """Implements LocalSystem."""

    supervisor: Supervisor
    planner: PlannerThread
    jobs: BackgroundLoop
    port: MetricsPort

    def poll(self) -> None:
        self.supervisor.poll()
        self.planner.tell_if_late()

    def hopeless(self) -> str | None:
        return self.supervisor.hopeless()

    def ready(self) -> None:
        self.port.start()
        self.jobs.start()
        self.planner.start()

    def stop(self, *, grace_s: float) -> None:
        began_s = time.monotonic()
        self.planner.stop(min(STOP_S, grace_s))
        self.jobs.stop(min(STOP_S, grace_s))
        self.port.stop()
        self.supervisor.stop(grace_s=max(0.0, grace_s - (time.monotonic() - began_s)))


def follow_load(
    supervisor: Supervisor, system: SystemConfig, run: RunDirectory, autoscaling: Autoscaling
) -> AutoscaledSystem:
    """`supervisor` with a planner beside it, which begins with `ready`."""
    live, targets = autoscaling.settings.live, autoscaling.settings.targets
    jobs = BackgroundLoop("autoscaler jobs")
    pools = pools_of(supervisor, system, run, live, jobs)
    gauges = PlannerGauges()
    planner = Planner(
        targets, autoscaling.models, DecisionLog(DecisionLogConfig(decision_file(run))), gauges
    )
    loop = PlannerLoop(planner, HttpStats(_routers(system, run)), pools, gauges)
    thread = PlannerThread(
        loop.step,
        clock=WallClock(),
        interval_s=live.interval_s,
        failed=lambda: loop.failed("decide"),
    )
    port = MetricsPort(
        gauges, host=LOOPBACK, port=0, targets_dir=run.targets, is_alive=lambda: not thread.is_late
    )
    return AutoscaledSystem(supervisor, thread, jobs, port)


def pools_of(
    supervisor: Supervisor,
    system: SystemConfig,
    run: RunDirectory,
    live: LiveConfig,
    jobs: BackgroundLoop,
) -> ProcessPools:
    """The workers of `supervisor`, to be changed while they serve."""
    return ProcessPools(
        supervisor,
        WorkerLauncher(system, run, os.environ),
        DirectoryRegistry(run.registry, clock=MonotonicClock()),
        jobs,
        MonotonicClock(),
        WallClock(),
        PoolTimes(live.drain_s, live.start_timeout_s, LOCAL_DRAIN_S + END_MARGIN_S),
        functools.partial(change_role, timeout_s=min(ROLE_CHANGE_S, live.drain_s)),
        open_tls(build(TlsConfig, router_values(system).get("tls", {}), where="router.tls.")),
    )


def _routers(system: SystemConfig, run: RunDirectory) -> StatsConfig:
    """Every copy by itself."""
    if system.has_own_ports:
        return StatsConfig(targets_dir=run.targets)
    return StatsConfig((f"http://{reachable_host(system.host)}:{system.http_port}",))


def _limits(limits: PoolLimits) -> str:
    return f"{limits.min_workers} to {limits.max_workers}"
