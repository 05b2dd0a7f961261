"""The workers of this container, as the registry directory of their own settings lists them.

For commands that run beside workers (probes, draining): they read the workers' settings, ask
nobody who they are and need no name. Every call has a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc

from baton.cli.doctor_places import DoctorSettings
from baton.core.clock import MonotonicClock
from baton.core.config import build, env_values, merge
from baton.core.errors import ConfigError, Unavailable
from baton.core.tls import TlsFiles, open_tls
from baton.core.worker_info import WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.rpc.channel import open_channel, unreachable_reason
from baton.settings import read_yaml

T = TypeVar("T")
DEFAULT_DRAIN_S = 20.0
EXPLAIN_MARGIN_S = 1.5


@dataclass(frozen=True, slots=True)
class LocalWorkers:
    """Who is here, and how to reach them."""

    workers: Sequence[WorkerInfo]
    drain_s: float
    tls: TlsFiles | None = field(repr=False)

    async def ask(
        self, call: Callable[[WorkerInfo, grpc.aio.Channel], Awaitable[T]], *, timeout_s: float
    ) -> list[T]:
        """`call` for all workers at once. Raises Unavailable naming the first that did not answer
        within `timeout_s`."""
        return list(
            await asyncio.gather(*(self._ask(info, call, timeout_s) for info in self.workers))
        )

    async def _ask(
        self,
        info: WorkerInfo,
        call: Callable[[WorkerInfo, grpc.aio.Channel], Awaitable[T]],
        timeout_s: float,
    ) -> T:
        try:
            async with asyncio.timeout(timeout_s + EXPLAIN_MARGIN_S):
                async with open_channel(info.address, self.tls) as channel:
                    try:
                        async with asyncio.timeout(timeout_s):
                            return await call(info, channel)
                    except grpc.aio.AioRpcError as error:
                        reason = await unreachable_reason(error, info.address, self.tls)
                        raise Unavailable(f"{info.worker_id}: {reason}") from None
        except TimeoutError:
            raise Unavailable(f"{info.worker_id}: no answer within {timeout_s:g} s") from None


async def find_local_workers(config: Path, environ: Mapping[str, str]) -> LocalWorkers:
    """Those in `registry.directory` of the settings in `config` and `environ`; where the settings
    name a worker, that one alone. Raises ConfigError."""
    layers = merge(read_yaml(config), env_values(environ, _WorkerSettings))
    known = {name: layers[name] for name in _FIELDS if name in layers}
    settings = build(_WorkerSettings, known)
    directory = settings.registry.directory
    if directory is None:
        raise ConfigError(f"registry.directory is not set in {config}; it lists the workers here")
    workers: Sequence[WorkerInfo] = ()
    if directory.is_dir():
        registry = DirectoryRegistry(directory, clock=MonotonicClock())
        workers = list((await registry.list()).values())
    if settings.worker_id is not None:
        workers = [info for info in workers if info.worker_id == settings.worker_id]
    return LocalWorkers(workers, settings.drain_s, open_tls(settings.tls))


@dataclass(frozen=True, slots=True)
class _WorkerSettings(DoctorSettings):
    """Beside how to reach a worker: which one, and how long it may take to leave."""

    worker_id: str | None = None
    drain_s: float = DEFAULT_DRAIN_S


_FIELDS = ("transfer", "registry", "tiers", "tls", "worker_id", "drain_s")
