"""The router without its edges: membership, sessions, index, dispatcher, metrics, composed.

The edges take `dispatcher` (a `generation.Generator`), `metrics` and `tenants`.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Collection, Mapping

from baton.core.clock import MonotonicClock
from baton.core.errors import ConfigError
from baton.core.metrics import SHARED_GARBAGE
from baton.core.tls import open_tls
from baton.engine.tokenizer import Tokenizer
from baton.registry.directory import DirectoryRegistry
from baton.registry.redis_registry import RedisRegistry
from baton.telemetry.metrics import Metrics
from services.router.admission.admission_gate import AdmissionGate
from services.router.admission.admission_record import AdmissionRecorder
from services.router.config import RouterConfig
from services.router.index.predicted import PredictedPrefixes
from services.router.index.prefix_index import PrefixIndex
from services.router.migration.migrate import Migrator
from services.router.placement.perf_model import PerfModel
from services.router.placement.perf_observer import PerfObserver
from services.router.placement.placer import Placer
from services.router.placement.topology import LinkPrices
from services.router.pool_stats import PoolStats
from services.router.pool_stats_book import PoolStatsBook
from services.router.requests.accounts import Accounts
from services.router.requests.dispatch import Dispatcher
from services.router.requests.failure_book import FailureBook
from services.router.requests.request_log import RequestRecorder
from services.router.requests.request_record import RequestRecord
from services.router.requests.starter import Starter
from services.router.requests.tracer import open_tracer
from services.router.router_gauges import RouterGauges, open_metrics, tenant_labels
from services.router.shared.opening import open_shared
from services.router.shared.state import SharedState
from services.router.tenants.quota import QuotaDesk
from services.router.tenants.tenants import open_tenants
from services.router.ui.ui import Ui
from services.router.workers.cluster_view import ClusterView
from services.router.workers.membership import Membership, RegistryMembership, StaticMembership
from services.router.workers.siblings import Siblings
from services.router.workers.worker_pool import WorkerPool


class RouterCore:
    """Built and used on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        tokenizers: Mapping[str, Tokenizer],
        membership: Membership,
        metrics: Metrics | None = None,
        shared: SharedState | None = None,
        rng: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`tokenizers`: by the model name that workers announce."""
        self.router_id = f"router-{secrets.token_hex(4)}"
        self.metrics = metrics or open_metrics(config)
        self.pool = WorkerPool(
            router_id=self.router_id,
            config=config.session,
            index=PrefixIndex(config.index.max_entries, max_pending=config.index.max_pending),
            metrics=self.metrics,
            wall_clock=wall_clock,
            tls=open_tls(config.tls),
            links=LinkPrices.from_config(config.policy),
        )
        self.perf = PerfModel(config.perf)
        self._stats = PoolStatsBook(config.pool_stats, _loop_time())
        rng = rng or random.Random()
        placer = Placer(
            self.pool,
            policy=config.policy,
            max_pending_deltas=config.session.max_pending_deltas,
            rng=rng,
            perf=self.perf,
            predicted=PredictedPrefixes(config.index.predicted_ttl_s),
        )
        self.shared = shared or open_shared(
            config.shared, copy_id=self.router_id, metrics=self.metrics
        )
        self.tenants = open_tenants(
            config.tenants, config.slo, shared=self.shared, metrics=self.metrics
        )
        siblings = Siblings(
            self.shared, self.pool.table, note_prefix=placer.predicted.note, now=_loop_time
        )
        placer.on_placed = siblings.placed
        labels = tenant_labels(config)
        accounts = Accounts(self.metrics, labels)
        self.pool.late_use = accounts.late_use
        self._tracer = open_tracer(config.tracing, self.router_id, self.metrics)
        self.ui = Ui(config.ui, self, wall_clock=wall_clock) if config.ui.enabled else None
        self._recorder = recorder = RequestRecorder(
            self.metrics,
            accounts=accounts,
            observer=PerfObserver(self.perf, self.pool.table, self.metrics, self._stats),
            ended=(self._tracer,) if self.ui is None else (self._tracer, self.ui.book),
            stats=self._stats,
        )
        failures = FailureBook(config.retry, config.breaker, metrics=self.metrics)
        starter = Starter(placer, failures=failures, recorder=recorder, wall_clock=wall_clock)
        self.gate = AdmissionGate(
            choose=starter.choose,
            start=starter.start,
            perf=self.perf,
            decoding=self.pool.decoding,
            num_computing=self.pool.num_computing,
            config=config.admission,
            slo=config.slo,
            worker_wait_s=config.dispatch.worker_wait_s,
            recorder=AdmissionRecorder(self.metrics, config.slo, labels, self._stats),
            wall_clock=wall_clock,
        )
        self.pool.subscribe(self.gate.poke)
        self.dispatcher = Dispatcher(
            pool=self.pool,
            starter=starter,
            gate=self.gate,
            quotas=QuotaDesk(
                self.shared, expected_output_tokens=config.admission.expected_output_tokens
            ),
            tokenizers=tokenizers,
            recorder=recorder,
            failures=failures,
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
        self._gauges = RouterGauges(
            self.metrics,
            view=self.pool.view,
            generator=self.dispatcher,
            others=(
                self.gate.update_gauges,
                recorder.update,
                self._tracer.update,
                lambda: self._stats.look(self.pool.view(), _loop_time()),
                *(() if self.ui is None else (self.ui.look,)),
            ),
        )
        self._shared_start: asyncio.Task[None] | None = None

    @classmethod
    def from_config(
        cls, config: RouterConfig, *, membership: Membership | None = None
    ) -> RouterCore:
        """Load the tokenizer and find workers as configured, or by `membership`.

        Raises ConfigError.
        """
        tokenizers = {config.served_model_name: Tokenizer.from_folder(config.model_path)}
        metrics = open_metrics(config)
        if membership is None:
            membership = _membership(config, metrics)
        return cls(config, tokenizers=tokenizers, membership=membership, metrics=metrics)

    def start(self) -> None:
        """Begin to follow the membership. Returns at once; `dispatcher.health` says when ready."""
        self._shared_start = asyncio.create_task(self.shared.start(), name="shared state start")
        self.pool.start(self._membership)
        self.dispatcher.start()
        self.migrator.start()
        self._gauges.start()

    def view(self) -> ClusterView:
        """The cluster at this moment."""
        return self.pool.view()

    def running(self) -> Collection[RequestRecord]:
        """Requests that are not over, oldest first."""
        return self._recorder.live

    def pool_stats(self) -> PoolStats:
        """What a planner is told, until now."""
        return self._stats.read(
            self.pool.view(),
            _loop_time(),
            num_running=self.dispatcher.num_in_flight,
            num_queued=self.gate.num_waiting,
        )

    async def stop(self) -> None:
        """End running requests with an error and close all sessions. Takes at most seconds."""
        await self.migrator.stop()
        await self.dispatcher.stop()
        # One turn of the loop, so that requests end with the dispatcher's reason.
        await asyncio.sleep(0)
        await self.pool.stop()
        await self._gauges.stop()
        await self._tracer.stop()
        if isinstance(self._membership, RegistryMembership):
            await self._membership.close()
        if self._shared_start is not None:
            await asyncio.gather(self._shared_start, return_exceptions=True)
            await self.shared.stop()


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


def _membership(config: RouterConfig, metrics: Metrics) -> Membership:
    if config.workers:
        return StaticMembership(config.workers)
    if config.registry_dir is not None:
        return RegistryMembership(DirectoryRegistry(config.registry_dir, clock=MonotonicClock()))
    if config.shared.url is not None:
        return RegistryMembership(
            RedisRegistry(
                config.shared.url,
                deployment=config.shared.deployment,
                on_garbage=lambda reason: metrics.add(SHARED_GARBAGE, 1, "registration"),
            )
        )
    raise ConfigError("no source of workers: set registry_dir, workers or shared.url")
