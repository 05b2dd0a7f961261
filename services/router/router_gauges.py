"""What a router shows of itself once a second, and the series that are there from the start."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import baton
from baton.core import metrics as series
from baton.core.block import HASH_SCHEME
from baton.core.vllm_metrics import VLLM_NAMES
from baton.core.worker_info import PROTOCOL_VERSION
from baton.telemetry.metrics import Metrics
from services.router.config import RouterConfig
from services.router.requests.generation import Generator
from services.router.tenants.tenant_labels import ANONYMOUS, MAX_TENANT_LABELS, TenantLabels
from services.router.workers.cluster_view import ClusterView
from services.router.workers.fabric_gauges import FabricGauges
from services.router.workers.worker_gauges import WorkerGauges

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
LAG_SAMPLES = 10
"""Timers a period that are looked at for being late."""
LAG_PERIODS = 10
"""Whose worst is shown."""


def open_metrics(config: RouterConfig) -> Metrics:
    """All series, with those label values that the settings decide."""
    metrics = Metrics(
        known={
            "model": (config.served_model_name,),
            "slo_class": tuple(config.slo.classes),
            "tenant": tenant_labels(config).known,
        },
        second_names=VLLM_NAMES if config.metrics.vllm_names else (),
        shows_process=True,
    )
    fingerprint = f"session-{PROTOCOL_VERSION}/{HASH_SCHEME}"
    metrics.set(series.BUILD_INFO, 1, baton.__version__, fingerprint)
    return metrics


def tenant_labels(config: RouterConfig) -> TenantLabels:
    """With the tenants that the settings name."""
    nobody = [] if config.tenants.needs_key else [ANONYMOUS]
    return TenantLabels([*nobody, *list(config.tenants.named)[:MAX_TENANT_LABELS]])


class RouterGauges:
    """One per router, on its event loop."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        view: Callable[[], ClusterView],
        generator: Generator,
        others: tuple[Callable[[], None], ...],
    ) -> None:
        """`others`: called once a second too."""
        self._metrics = metrics
        self._view = view
        self._generator = generator
        self._others = others
        self._workers = WorkerGauges(metrics)
        self._fabric = FabricGauges(metrics)
        self._lags_s: deque[float] = deque(maxlen=LAG_PERIODS)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="router gauges")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self.update()
            except Exception:
                # Requests do not depend on being counted, and the next look may succeed.
                logger.exception("the gauges could not be updated; trying again")
            self._lags_s.append(await _worst_lag_s())

    async def update(self) -> None:
        view = self._view()
        self._workers.update(view)
        self._fabric.update(view)
        for other in self._others:
            other()
        self._metrics.set(series.LOOP_LAG, max(self._lags_s, default=0.0))
        health = await self._generator.health()
        self._metrics.set(series.ROUTER_READY, float(health.is_ready))


async def _worst_lag_s() -> float:
    """Takes one period."""
    loop = asyncio.get_running_loop()
    worst_s = 0.0
    for _ in range(LAG_SAMPLES):
        due_at_s = loop.time() + PERIOD_S / LAG_SAMPLES
        await asyncio.sleep(PERIOD_S / LAG_SAMPLES)
        worst_s = max(worst_s, loop.time() - due_at_s)
    return worst_s
