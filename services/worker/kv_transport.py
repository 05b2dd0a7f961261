"""The KV transport of a worker: one over the pool of each rank, joined into one.

    one pool            the transport over it
    a pool per rank     rank 0's here; in the processes of the others `RankTransfer`, a service of
                        the engine's ranks (`rank_service`), commanded over a socket

Not known here: how blocks are moved, what for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.errors import ConfigError, TransferError
from baton.core.tls import open_tls
from baton.engine.config import Device, EngineConfig
from baton.engine.host_memory import PoolMemory
from baton.engine.tensor_parallel.rank_service import RankKv, RankServiceSpec
from kvtransfer.group_transport import GroupTransport, RankTransport
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.rank_proxy import RankProxy
from kvtransfer.rank_server import serve_rank
from kvtransfer.select import TransportKind, create_transport, needs_shared_pool
from kvtransfer.shm_transport import ShmPool
from kvtransfer.socket_link import SocketConfig
from kvtransfer.transport import PoolRegion
from services.worker.config import WorkerConfig

logger = logging.getLogger(__name__)

RANK_TRANSFER = "services.worker.kv_transport:RankTransfer"
OPEN_TIMEOUT_S = 30.0
"""For a rank that is ready for steps to say what its transport offers."""
EXIT_FAILED = 1


@dataclass(frozen=True, slots=True)
class RankTransferSettings:
    """What a rank needs to move KV in its worker's name."""

    config: WorkerConfig
    identity: PeerIdentity
    secret: bytes = field(repr=False)


@dataclass(slots=True)
class HostPool:
    """Memory for a pool in host memory that others can read, made when its size is known."""

    config: WorkerConfig
    shared: ShmPool | None = None

    @property
    def is_wanted(self) -> bool:
        """Where any memory will do, the engine takes its own."""
        on_gpu = self.config.engine.device is Device.CUDA
        return needs_shared_pool(self.config.transfer.transport) and not on_gpu

    def make(self, num_bytes: int) -> PoolMemory:
        self.shared = ShmPool.create(num_bytes)
        return PoolMemory(self.shared.memory, self.shared.fd)


def rank_service(settings: RankTransferSettings) -> RankServiceSpec | None:
    """For the engine's other ranks; None when rank 0's pool is all there is."""
    engine = settings.config.engine
    return RankServiceSpec(RANK_TRANSFER, settings) if has_pool_per_rank(engine) else None


def has_pool_per_rank(config: EngineConfig) -> bool:
    return config.tp_size > 1 and (config.pool_per_rank or config.device is Device.CUDA)


def may_go_without(config: WorkerConfig) -> bool:
    """A worker on a GPU that no peer can read serves by itself all the same, unless it is told
    which transport to use: many stand alone, on machines that forbid what a transport needs."""
    on_gpu = config.engine.device is Device.CUDA
    return on_gpu and config.transfer.transport is TransportKind.AUTO


def region_of(kv: RankKv) -> PoolRegion:
    return PoolRegion(
        address=kv.address,
        num_bytes=kv.num_bytes,
        num_blocks=kv.num_blocks + kv.num_scratch_blocks,
        layout=kv.layout,
        device_id=kv.device_id,
        num_scratch_blocks=kv.num_scratch_blocks,
        tp_rank=kv.parallel.tp_rank,
        tp_size=kv.parallel.tp_size,
    )


def open_rank_transport(
    settings: RankTransferSettings, region: PoolRegion, pool: ShmPool | None
) -> MoverTransport:
    """Of one rank, in its own process. Takes half a second.

    Raises ConfigError, or TransferError when the wanted transport does not work here.
    """
    config = settings.config
    return create_transport(
        config.transfer.transport,
        region,
        settings.identity,
        settings.secret,
        shared_pool=pool,
        socket=SocketConfig(
            host=config.host, advertise_host=config.advertise_host, tls=open_tls(config.tls)
        ),
    )


async def join_ranks(
    own: RankTransport, sockets: Sequence[socket.socket], region: PoolRegion, secret: bytes
) -> GroupTransport:
    """The worker's transport from rank 0's and those behind `sockets`, of ranks 1, 2, ...

    Takes all of them, also when it fails. Raises TransferError.
    """
    opened = await asyncio.gather(
        *(
            RankProxy.open(connection, rank=rank, secret=secret, timeout_s=OPEN_TIMEOUT_S)
            for rank, connection in enumerate(sockets, start=1)
        ),
        return_exceptions=True,
    )
    proxies = [proxy for proxy in opened if isinstance(proxy, RankProxy)]
    failures = [failure for failure in opened if isinstance(failure, BaseException)]
    group = GroupTransport([own, *proxies], region=region, secret=secret)
    if failures:
        await group.close()
        raise failures[0]
    return group


class RankTransfer:
    """Implements `rank_service.RankService`: moves the KV of a rank for rank 0."""

    def __init__(self, settings: object, connection: socket.socket) -> None:
        if not isinstance(settings, RankTransferSettings):
            raise ConfigError(
                f"a rank's transfer needs its settings, got {type(settings).__name__}"
            )
        self._settings = settings
        self._connection = connection
        self._pool = HostPool(settings.config)

    def make_pool(self, num_bytes: int) -> PoolMemory:
        return self._pool.make(num_bytes)

    def start(self, kv: RankKv) -> None:
        """See `RankService`. Raises ConfigError or TransferError."""
        try:
            transport = open_rank_transport(self._settings, region_of(kv), self._pool.shared)
        except TransferError as error:
            if not may_go_without(self._settings.config):
                raise
            logger.warning("no KV transport: %s", error)
            # By which rank 0 knows.
            self._connection.close()
            return
        threading.Thread(
            target=self._serve, args=(transport,), name="rank transfer", daemon=True
        ).start()

    def _serve(self, transport: MoverTransport) -> None:
        try:
            asyncio.run(serve_rank(self._connection, transport))
        except BaseException:
            # A rank whose KV cannot be read is of no use; its end is noticed, and the group ends.
            logger.exception("the transfer of this rank failed")
            os._exit(EXIT_FAILED)
