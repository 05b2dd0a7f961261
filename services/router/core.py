"""The router without its edges: membership, sessions, index, dispatcher, metrics, composed.

The edges take `dispatcher` (a `generation.Generator`) and `metrics`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping

from baton.core.clock import MonotonicClock
from baton.core.errors import ConfigError
from baton.core.tls import open_tls
from baton.engine.tokenizer import Tokenizer
from baton.registry.directory import DirectoryRegistry
from baton.telemetry.metrics import Metrics
from services.router.config import RouterConfig
from services.router.dispatch import Dispatcher
from services.router.fabric_gauges import FabricGauges
from services.router.membership import Membership, RegistryMembership, StaticMembership
from services.router.migrate import Migrator
from services.router.placer import Placer
from services.router.prefix_index import PrefixIndex
from services.router.request_log import RequestRecorder
from services.router.worker_gauges import WorkerGauges
from services.router.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

GAUGE_PERIOD_S = 1.0


class RouterCore:
    """Built and used on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        tokenizers: Mapping[str, Tokenizer],
        membership: Membership,
        metrics: Metrics | None = None,
        rng: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`tokenizers`: by the model name that workers announce."""
        self.router_id = f"router-{secrets.token_hex(4)}"
        self.metrics = metrics or Metrics()
        self.pool = WorkerPool(
            router_id=self.router_id,
            config=config.session,
            index=PrefixIndex(config.index.max_entries),
            wall_clock=wall_clock,
            tls=open_tls(config.tls),
        )
        rng = rng or random.Random()
        placer = Placer(
            self.pool,
            policy=config.policy,
            max_pending_deltas=config.session.max_pending_deltas,
            rng=rng,
        )
        self.dispatcher = Dispatcher(
            pool=self.pool,
            placer=placer,
            tokenizers=tokenizers,
            recorder=RequestRecorder(self.metrics),
            config=config.dispatch,
            health=config.health,
            rng=rng,
            wall_clock=wall_clock,
        )
        self.migrator = Migrator(
            pool=self.pool,
            flights=self.dispatcher.flights,
            metrics=self.metrics,
            config=config.migration,
            wall_clock=wall_clock,
        )
        self._membership = membership
        self._gauges = WorkerGauges(self.metrics)
        self._fabric_gauges = FabricGauges(self.metrics)
        self._gauge_task: asyncio.Task[None] | None = None

    @classmethod
    def from_config(
        cls, config: RouterConfig, *, membership: Membership | None = None
    ) -> RouterCore:
        """Load the tokenizer and find workers as configured, or by `membership`.

        Raises ConfigError.
        """
        tokenizers = {config.served_model_name: Tokenizer.from_folder(config.model_path)}
        return cls(config, tokenizers=tokenizers, membership=membership or _membership(config))

    def start(self) -> None:
        """Begin to follow the membership. Returns at once; `dispatcher.health` says when ready."""
        self.pool.start(self._membership)
        self.dispatcher.start()
        self.migrator.start()
        self._gauge_task = asyncio.create_task(self._update_gauges(), name="worker gauges")

    async def stop(self) -> None:
        """End running requests with an error and close all sessions. Takes at most seconds."""
        await self.migrator.stop()
        await self.dispatcher.stop()
        # One turn of the loop, so that requests end with the dispatcher's reason.
        await asyncio.sleep(0)
        await self.pool.stop()
        if self._gauge_task is not None:
            self._gauge_task.cancel()
            await asyncio.gather(self._gauge_task, return_exceptions=True)

    async def _update_gauges(self) -> None:
        while True:
            view = self.pool.view()
            self._gauges.update(view)
            self._fabric_gauges.update(view)
            await asyncio.sleep(GAUGE_PERIOD_S)


def _membership(config: RouterConfig) -> Membership:
    if config.workers:
        return StaticMembership(config.workers)
    if config.registry_dir is not None:
        return RegistryMembership(DirectoryRegistry(config.registry_dir, clock=MonotonicClock()))
    raise ConfigError("no source of workers: set registry_dir or workers")
