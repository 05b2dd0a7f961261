"""One worker: starts the parts in order and stops them in order.

start: backend (weights, pool, transport, warm-up) ─► engine thread ─► gRPC ─► registration
stop:  leave the registry ─► drain ─► sessions, gRPC ─► transfers ─► transport ─► engine thread
       ─► the other ranks

Runs inside any event loop: its own process (`main`) or a Ray Serve replica (`deployment`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.core.clock import MonotonicClock
from baton.core.errors import ConfigError, InternalError, Unavailable
from baton.core.logging import log_fields
from baton.core.tls import TlsFiles, open_tls
from baton.core.worker_info import Epoch, WorkerId, WorkerInfo
from baton.engine.tensor_parallel.group import RankGroup
from baton.registry.directory import DirectoryRegistry, shared_secret
from baton.registry.redis_registry import RedisRegistry
from baton.registry.registry import Registry
from baton.rpc.channel import is_loopback, listen, new_server
from baton.rpc.tls import ServerTls
from baton.rpc.v1 import transfer_pb2_grpc, worker_pb2_grpc
from kvtransfer.metadata import PeerIdentity
from services.worker.assembly import SERVICE_NAMES, Parts, assemble
from services.worker.backend import Backend, open_backend
from services.worker.config import WorkerConfig
from services.worker.health import HealthVerdict
from services.worker.pool_mates import PoolMates
from services.worker.readiness import ReadySignal, reason_not_ready
from services.worker.registration import keep_registered

logger = logging.getLogger(__name__)

SERVER_GRACE_S = 1.0
"""After the drain: for answers on their way."""
BackendOpener = Callable[[WorkerConfig, PeerIdentity, bytes], Awaitable[Backend]]


class WorkerServer:
    """Start once, stop once. All calls on one event loop."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        open_backend: BackendOpener = open_backend,
        fixed_role: str = "",
    ) -> None:
        """`fixed_role`: why this worker never changes its role, empty where it may."""
        self._config = config
        self._open_backend = open_backend
        self._fixed_role = fixed_role
        self._parts: Parts | None = None
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._registrations: list[asyncio.Task[None]] = []
        self._registered: dict[int, bool] = {}
        """Registry -> whether the worker was in it when it last looked."""
        self._backend: Backend | None = None
        self._has_stopped = False

    @property
    def info(self) -> WorkerInfo:
        """Known once `start` has returned."""
        return self.parts.roles.info

    @property
    def parts(self) -> Parts:
        """For health checks and tests; known once `start` has returned."""
        if self._parts is None:
            raise InternalError("the worker has not started yet")
        return self._parts

    async def start(self) -> WorkerInfo:
        """Load, warm up, listen, announce. On any error what was started is stopped again.

        Raises ConfigError, or TransferError when the wanted transport does not work here.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop(drain_s=0)
            raise

    async def stop(self, drain_s: float | None = None) -> None:
        """Drain for at most `drain_s` (None: as configured) and stop. Later calls do nothing."""
        if self._has_stopped:
            return
        self._has_stopped = True
        parts, backend = self._parts, self._backend
        if parts is not None:
            await _attempt("a change of role", parts.roles.close())
        await asyncio.gather(*(_end(registration) for registration in self._registrations))
        if parts is not None:
            serving_s = self._config.drain_s if drain_s is None else drain_s
            await _attempt("serving", self._stop_serving(parts, serving_s))
        for task in self._tasks:
            await _end(task)
        if parts is not None:
            await _attempt("imports", parts.imports.close())
            if parts.tiering is not None:
                await _attempt("the tiers", parts.tiering.stop())
            await _attempt("transfers", parts.reads.close())
            await _attempt("links", parts.mesh.close())
        if backend is not None:
            await _attempt("the KV transport", backend.transport.close())
        if parts is not None:
            await _attempt("the engine", parts.engine.stop())
        if backend is not None and backend.ranks is not None:
            await _attempt("the ranks", asyncio.to_thread(backend.ranks.close))
        logger.info("stopped")

    async def failed(self) -> None:
        """Returns when the started worker is beyond help: it is to be stopped and replaced."""
        await self.parts.health.failed.wait()

    async def check_health(self) -> HealthVerdict:
        """Answers within `health.ping_timeout_s`."""
        if self._parts is None or self._has_stopped:
            return HealthVerdict(False, "the worker is not running")
        return await self._parts.health.check()

    async def _start(self) -> WorkerInfo:
        config = self._config
        secret = self._secret()
        tls = open_tls(config.tls)
        worker_id = WorkerId(config.worker_id or f"{config.role.value}-{secrets.token_hex(4)}")
        identity = PeerIdentity(worker_id, Epoch(secrets.token_hex(8)))
        backend = self._backend = await self._open_backend(config, identity, secret)
        server_tls = None if tls is None else ServerTls(tls)
        server = self._server = new_server(tls=server_tls)
        info = self._describe(identity, backend, address=self._listen(server, server_tls))
        parts = self._parts = assemble(
            config, info, backend, secret, tls, fixed_role=self._fixed_role
        )
        parts.engine.start()
        await parts.engine.warm_up()
        if parts.tiering is not None:
            parts.tiering.start()
        worker_pb2_grpc.add_WorkerServicer_to_server(parts.worker_service, server)
        transfer_pb2_grpc.add_TransferServicer_to_server(parts.transfer_service, server)
        health_pb2_grpc.add_HealthServicer_to_server(parts.health.servicer, server)
        reflection.enable_server_reflection(
            (*SERVICE_NAMES, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
        )
        await server.start()
        self._spawn(parts, "health watch", parts.health.watch())
        self._spawn(parts, "lease clock", parts.leases.tick_forever())
        self._spawn(parts, "warm mesh", parts.mesh.tick_forever())
        self._spawn(parts, "load report", self._repeat_load(parts))
        if backend.ranks is not None:
            self._watch_ranks(backend.ranks, parts)
        self._announce(parts, tls)
        ready = ReadySignal(parts.health.servicer, lambda: self._reason_not_ready(parts))
        self._spawn(parts, "readiness", ready.watch())
        log_fields(
            logger,
            f"ready at {info.address} ({info.transport}, pid {info.pid})",
            address=info.address,
            role=info.role.value,
            worker=info.worker_id,
            model=info.model_name,
            pid=info.pid,
            transport=info.transport,
            num_blocks=info.num_blocks,
            tp_size=config.engine.tp_size,
        )
        return info

    def _watch_ranks(self, ranks: RankGroup, parts: Parts) -> None:
        """A worker that has lost a rank is to be replaced, whatever its engine thread does."""
        loop = asyncio.get_running_loop()

        def give_up(reason: str) -> None:
            # The loop may have ended with the worker.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(parts.health.give_up, reason)

        ranks.on_failure(give_up)

    async def _stop_serving(self, parts: Parts, drain_s: float) -> None:
        await parts.health.leave()
        if parts.engine.is_alive:
            await parts.drain.run(timeout_s=drain_s)
        parts.sessions.close_all(Unavailable("the worker is shutting down"))
        parts.leases.close()
        if self._server is not None:
            await self._server.stop(SERVER_GRACE_S)

    def _describe(self, identity: PeerIdentity, backend: Backend, *, address: str) -> WorkerInfo:
        return WorkerInfo(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            role=self._config.role,
            address=address,
            model_name=self._config.served_model_name,
            layout=backend.layout,
            num_blocks=backend.num_blocks,
            max_model_len=backend.max_model_len,
            max_num_seqs=self._config.engine.max_num_seqs,
            transport=backend.transport.name,
            pid=os.getpid(),
        )

    def _secret(self) -> bytes:
        transfer, directory = self._config.transfer, self._config.registry.directory
        if transfer.cluster_secret is not None:
            return transfer.cluster_secret.encode()
        if directory is not None:
            return shared_secret(directory).encode()
        logger.warning(
            "neither transfer.cluster_secret nor registry.directory is set: "
            "no other worker can exchange KV with this one"
        )
        return secrets.token_bytes(32)

    def _listen(self, server: grpc.aio.Server, tls: ServerTls | None) -> str:
        config = self._config
        if tls is None and not is_loopback(config.host):
            logger.warning(
                "listening on %s without TLS: tokens and KV leases pass in the clear; "
                "`baton certs` makes certificates for tls.ca_file, cert_file and key_file",
                config.host,
            )
        port = listen(server, _authority(config.host, config.port), tls)
        if not port:
            raise ConfigError(
                f"cannot listen on {config.host} port {config.port}: it is taken or not ours; "
                "port 0 takes a free one"
            )
        return _authority(config.advertise_host or config.host, port)

    def _announce(self, parts: Parts, tls: TlsFiles | None) -> None:
        config = self._config.registry
        registries: list[Registry] = []
        if config.directory is not None:
            registries.append(DirectoryRegistry(config.directory, clock=MonotonicClock()))
        if config.url is not None:
            registries.append(RedisRegistry(config.url, deployment=config.deployment))
        self._registered = dict.fromkeys(range(len(registries)), False)

        def keep(index: int, registry: Registry) -> Coroutine[None, None, None]:
            def tell(is_registered: bool) -> None:
                self._registered[index] = is_registered

            roles = parts.roles
            return keep_registered(registry, lambda: roles.announced, ttl_s=config.ttl_s, tell=tell)

        is_shared = [not config.directory_is_local] * (config.directory is not None)
        is_shared += [True] * (config.url is not None)
        parts.roles.attach(PoolMates(registries, ttl_s=config.ttl_s, is_shared=is_shared, tls=tls))
        self._registrations = [
            self._spawn(parts, "registration", keep(index, registry))
            for index, registry in enumerate(registries)
        ]

    def _reason_not_ready(self, parts: Parts) -> str | None:
        return reason_not_ready(
            is_healthy=parts.health.is_serving,
            is_draining=parts.requests.is_draining,
            registered=list(self._registered.values()),
            num_untried_peers=parts.mesh.num_untried(),
        )

    async def _repeat_load(self, parts: Parts) -> None:
        while True:
            await asyncio.sleep(self._config.session.load_period_s)
            parts.requests.repeat_load()
            parts.fabric.tell_if_changed()

    def _spawn(
        self, parts: Parts, name: str, work: Coroutine[None, None, None]
    ) -> asyncio.Task[None]:
        """Work that never ends by itself: when it does, the worker has failed."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and not self._has_stopped:
                logger.error("background task ended: %s", name, exc_info=task.exception())
                parts.health.give_up(f"its background task has ended: {name}")

        task = asyncio.create_task(work, name=name)
        task.add_done_callback(ended)
        self._tasks.append(task)
        return task


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for it; how it ends only matters to the log."""
    if task.done():
        return
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Exception):
        logger.error("background task ended: %s", task.get_name(), exc_info=outcome)


async def _attempt(what: str, stopping: Awaitable[None]) -> None:
    """One part that does not stop cleanly must not keep the others running."""
    try:
        await stopping
    except Exception:
        logger.exception("could not stop %s cleanly", what)
