"""What a worker computes and moves with: the engine over its pool, and the transport over it.

The pool's memory comes first, because only shared memory can be offered to peers without NIXL.
Loading runs on a thread of its own, which ends with it: the event loop stays free for signals,
and the tensor library's helper threads of that thread end too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from baton.core.clock import WallClock
from baton.core.kv_layout import KvLayout
from baton.core.logging import log_fields
from baton.engine.config import Device, EngineConfig
from baton.engine.host_memory import PoolMemory
from baton.engine.tensor_parallel.group import RankGroup
from kvtransfer.metadata import PeerIdentity
from kvtransfer.no_transport import NoTransport
from kvtransfer.select import create_transport, needs_shared_pool
from kvtransfer.shm_transport import ShmPool
from kvtransfer.transport import PoolRegion, Transport
from services.worker.config import WorkerConfig
from services.worker.core_share import AllCores, CoreShare, share_cores, shared_file
from services.worker.engine_api import EngineApi

if TYPE_CHECKING:
    from baton.engine.factory import BuiltEngine

logger = logging.getLogger(__name__)
T = TypeVar("T")

ON_GPU = "its KV lies in GPU memory, which is not handed over yet"


@dataclass(frozen=True, slots=True)
class Backend:
    """Ready to be driven by an engine loop; nothing runs yet."""

    engine: EngineApi
    layout: KvLayout
    num_blocks: int
    max_model_len: int
    transport: Transport
    cores: AllCores | CoreShare = field(default_factory=AllCores)
    ranks: RankGroup | None = None
    """The processes of the engine's other ranks, to be closed after the last step."""


@dataclass(slots=True)
class _SharedPool:
    """Shared memory for the pool when the transport needs it, made when the size is known."""

    pool: ShmPool | None = field(default=None)

    def make(self, num_bytes: int) -> PoolMemory:
        self.pool = ShmPool.create(num_bytes)
        return PoolMemory(self.pool.memory, self.pool.fd)


async def open_backend(config: WorkerConfig, identity: PeerIdentity, secret: bytes) -> Backend:
    """Load the model, make the pool, open the transport.

    Raises ConfigError, or TransferError when the wanted transport does not work here.
    """
    return await _on_own_thread(lambda: _open(config, identity, secret))


def _open(config: WorkerConfig, identity: PeerIdentity, secret: bytes) -> Backend:
    # The tensor library takes seconds to import; `--help` and configuration errors need not wait.
    from baton.engine.factory import build_engine

    started_s = time.monotonic()
    name = config.served_model_name
    log_fields(logger, f"loading weights of {name}", model=name)
    kind = config.transfer.transport
    on_gpu = config.engine.device is Device.CUDA
    memory = _SharedPool()
    built = build_engine(
        config.engine,
        clock=WallClock(),
        pool_memory_factory=memory.make if needs_shared_pool(kind) and not on_gpu else None,
    )
    loading_s = round(time.monotonic() - started_s, 2)
    log_fields(
        logger,
        f"engine built in {loading_s} s",
        num_blocks=built.num_blocks,
        block_bytes=built.layout.block_bytes,
        tp_size=config.engine.tp_size,
        rank_pids=built.ranks.pids if built.ranks is not None else [],
        seconds=loading_s,
    )
    try:
        transport = _open_transport(config, built, identity, secret, memory.pool)
    except BaseException:
        if built.ranks is not None:
            built.ranks.close()
        raise
    return Backend(
        built.engine,
        built.layout,
        built.num_blocks,
        built.max_model_len,
        transport,
        _cores(config.engine),
        built.ranks,
    )


def _open_transport(
    config: WorkerConfig,
    built: BuiltEngine,
    identity: PeerIdentity,
    secret: bytes,
    pool: ShmPool | None,
) -> Transport:
    if config.engine.device is Device.CUDA:
        logger.info("KV transport: none (%s)", ON_GPU)
        return NoTransport(ON_GPU)
    region = PoolRegion(
        address=built.pool_address,
        num_bytes=built.pool_bytes,
        num_blocks=built.num_blocks,
        layout=built.layout,
    )
    return create_transport(config.transfer.transport, region, identity, secret, shared_pool=pool)


def _cores(config: EngineConfig) -> AllCores | CoreShare:
    """Shared with the other workers of the host unless the thread count is set by hand."""
    import torch

    if config.num_threads is not None:
        return AllCores()
    cores = os.sched_getaffinity(0)

    def set_num_threads(num_threads: int) -> None:
        # Of the worker's share each rank takes its part; rank 0 tells the others with each step.
        torch.set_num_threads(max(1, num_threads // config.tp_size))

    return share_cores(
        shared_file(sorted(cores)), num_cores=len(cores), set_num_threads=set_num_threads
    )


async def _on_own_thread(function: Callable[[], T]) -> T:
    """Like asyncio.to_thread on a fresh daemon thread: giving up waiting leaves it behind."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def deliver(value: T | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        try:
            value = function()
        except Exception as error:
            loop.call_soon_threadsafe(deliver, None, error)
        else:
            loop.call_soon_threadsafe(deliver, value, None)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await result
