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
from baton.core.errors import TransferError
from baton.core.kv_layout import KvLayout
from baton.core.logging import log_fields
from baton.engine.config import EngineConfig
from baton.engine.tensor_parallel.group import RankGroup
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.no_transport import NoTransport
from kvtransfer.shm_transport import ShmPool
from kvtransfer.transport import PoolRegion, Transport
from services.worker.config import WorkerConfig
from services.worker.core_share import AllCores, CoreShare, share_cores, shared_file
from services.worker.engine_api import EngineApi
from services.worker.kv_transport import (
    HostPool,
    RankTransferSettings,
    join_ranks,
    may_go_without,
    open_rank_transport,
    rank_service,
    region_of,
)

if TYPE_CHECKING:
    from baton.engine.factory import BuiltEngine

logger = logging.getLogger(__name__)
T = TypeVar("T")

NUM_SCRATCH_BLOCKS = 8
"""Enough that a timed read of all of them is slow enough to be timed."""


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
    region: PoolRegion | None = None
    """The pool of this process; None keeps the tiers out."""


async def open_backend(config: WorkerConfig, identity: PeerIdentity, secret: bytes) -> Backend:
    """Load the model, make the pool, open the transport.

    Raises ConfigError, or TransferError when the wanted transport does not work here.
    """
    settings = RankTransferSettings(config, identity, secret)
    opened = await _on_own_thread(lambda: _open(settings))
    built = opened.built
    try:
        transport = await _joined(opened, settings)
    except BaseException:
        if built.ranks is not None:
            await asyncio.to_thread(built.ranks.close)
        raise
    return Backend(
        built.engine,
        built.layout,
        built.num_blocks,
        built.max_model_len,
        transport,
        _cores(config.engine),
        built.ranks,
        opened.region,
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """The engine, and the transport over the pool of this process."""

    built: BuiltEngine
    region: PoolRegion
    transport: MoverTransport | NoTransport


async def _joined(opened: _Opened, settings: RankTransferSettings) -> Transport:
    """The transport with those of the other ranks."""
    ranks, region = opened.built.ranks, opened.region
    if isinstance(opened.transport, NoTransport):
        return opened.transport
    sockets = []
    if ranks is not None and region.tp_size > 1:
        sockets = ranks.take_service_sockets()
    try:
        return await join_ranks(opened.transport, sockets, region, settings.secret)
    except TransferError as error:
        return _none(settings, error)


def _open(settings: RankTransferSettings) -> _Opened:
    # The tensor library takes seconds to import; `--help` and configuration errors need not wait.
    from baton.engine.factory import build_engine

    config = settings.config
    started_s = time.monotonic()
    name = config.served_model_name
    log_fields(logger, f"loading weights of {name}", model=name)
    memory = HostPool(config)
    built = build_engine(
        config.engine,
        clock=WallClock(),
        pool_memory_factory=memory.make if memory.is_wanted else None,
        rank_service=rank_service(settings),
        num_scratch_blocks=NUM_SCRATCH_BLOCKS,
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
    region = region_of(built.kv)
    try:
        transport = _rank_transport(settings, region, memory.shared)
    except BaseException:
        if built.ranks is not None:
            built.ranks.close()
        raise
    return _Opened(built, region, transport)


def _rank_transport(
    settings: RankTransferSettings, region: PoolRegion, pool: ShmPool | None
) -> MoverTransport | NoTransport:
    try:
        return open_rank_transport(settings, region, pool)
    except TransferError as error:
        return _none(settings, error)


def _none(settings: RankTransferSettings, error: TransferError) -> NoTransport:
    """Raises `error` where there has to be a transport."""
    if not may_go_without(settings.config):
        raise error
    logger.warning("KV transport: none (%s)", error)
    return NoTransport(str(error))


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
